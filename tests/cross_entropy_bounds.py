"""Error bounds of the loss on Triton: for its row pass, and for the whole op with the roundings of its products."""

import math

import torch
from triton_linear import narrow_product

from lab.testing import UNIT_ROUNDOFF, Bound

EXP2_ULPS, LOG2_ULPS, DIVIDE_ULPS = 2.0, 2.0, 2.0
"""Largest errors of the GPU's approximations (CUDA C++ Programming Guide, tables of intrinsic and of standard functions)."""
TANH_ULPS = 2 * (EXP2_ULPS + 2) + DIVIDE_ULPS
"""Error of ``(1 - e) / (1 + e)`` with ``e = exp2(-2 log2(e) |v|)``, relative to 1. The two roundings of the exponent contribute at most
``2 e log(1 / e) < 0.74``, each sum contributes one, and the errors of the numerator and of the denominator add up in the quotient."""
UNIT = UNIT_ROUNDOFF[torch.float32]


def exact(value):
    return Bound(value.double(), torch.zeros_like(value, dtype=torch.float64), UNIT)


def constant(value):
    """A number that the kernel gets as a float32."""
    return exact(torch.tensor(value, dtype=torch.float64)).round(torch.float32)


def exp2(argument, ulps):
    slope = math.log(2) * torch.exp2(argument.value + argument.error)
    return argument.map(torch.exp2, slope, ulps, size=torch.exp2)


def capped(z, row_loss):
    """``(y, y / softcap)`` for the logits ``y`` after scale and softcap."""
    y = z * constant(row_loss.logit_scale)
    if row_loss.softcap is None:
        return y, None
    cap = row_loss.softcap
    share = y.map(lambda v: v / cap, 1 / cap, DIVIDE_ULPS)
    nearest = (share.value.abs() - share.error).clamp(min=0)
    tanh = share.map(torch.tanh, 1 - torch.tanh(nearest) ** 2, TANH_ULPS, torch.ones_like)
    return tanh * constant(cap), (tanh * constant(cap)).map(lambda v: v / cap, 1 / cap, DIVIDE_ULPS)


def row_bounds(z, target, block_v, row_loss, dtype, factor=None):
    """Bounds of (loss, lse, dz) for raw logits ``z``. Rows with a negative target are zero."""
    V, counted, index = z.value.shape[1], (target >= 0)[:, None], target.clamp(min=0)[:, None]
    y, share = capped(z, row_loss)
    y2 = y * constant(math.log2(math.e))
    top = exact(y2.value.amax(1, keepdim=True))
    # in each block and at the end, a running sum is multiplied by exp2(old - new maximum), with an exp2 and a rounding
    spread = float((y2.value.amax(1) - y2.value.amin(1) + 2 * y2.error.amax(1)).max())
    rescalings = -(-V // block_v) + 2
    p = exp2(y2 - top, rescalings * (EXP2_ULPS + 1 + math.log(2) * spread))
    total = p.sum(1, keepdim=True)
    slope = 1 / (math.log(2) * (total.value - total.error))
    lse2 = total.map(torch.log2, slope, LOG2_ULPS) + top
    lse = lse2 * constant(math.log(2))

    smoothing, rest = (
        constant(value) for value in (row_loss.label_smoothing, 1 - row_loss.label_smoothing)
    )
    y_target = Bound(y.value.gather(1, index), y.error.gather(1, index), UNIT)
    loss = lse - y_target
    one_hot = torch.nn.functional.one_hot(index[:, 0], V).double()
    if row_loss.label_smoothing:
        mean = y.sum(1, keepdim=True).map(lambda v: v / V, 1 / V, DIVIDE_ULPS)
        loss = loss * rest + (lse - mean) * smoothing
    if row_loss.z_loss:
        loss = loss + lse * lse * constant(row_loss.z_loss)

    dz = exp2(y2 - lse2, EXP2_ULPS)
    if row_loss.z_loss:
        dz = dz * (exact(torch.tensor(1.0)) + lse * constant(2 * row_loss.z_loss))
    if row_loss.label_smoothing:
        spread_evenly = smoothing.map(lambda v: v / V, 1 / V, DIVIDE_ULPS)
        dz = dz - (rest * exact(one_hot) + spread_evenly)
    else:
        dz = dz - exact(one_hot)
    if share is not None:
        dz = dz * (exact(torch.tensor(1.0)) - share * share)
    scale = constant(row_loss.logit_scale)
    if factor is not None:
        scale = scale * exact(factor[:, None])
    dz = (dz * scale).round(dtype)
    return (loss * counted)[:, 0], (lse * counted)[:, 0], dz * counted


class LinearCrossEntropy:
    """The whole op with the roundings of its schedule. Gradients of parameters are summed in float32 over all rows."""

    def __init__(self, tensors, target, row_loss, block_v, lora_scale, dtype=None):
        self.tensors = {name: t.detach() for name, t in tensors.items()}
        self.dtype, self.row_loss, self.block_v = (
            dtype or tensors["hidden"].dtype,
            row_loss,
            block_v,
        )
        self.h = Bound.of(self.tensors["hidden"].flatten(0, -2))
        self.A, self.B = (Bound.of(self.tensors[name]) for name in "AB")
        self.wide = torch.promote_types(self.dtype, self.tensors["A"].dtype)
        self.target, self.lora_scale = target.flatten(), constant(lora_scale)
        self.s = (self.h @ self.A.T).round(self.wide)
        update = self.narrow_product(self.s, self.B.T)
        update = update * self.lora_scale + Bound.of(self.tensors["bias"])
        W = Bound.of(self.tensors["weight"])
        self.z = update.round(self.dtype).addmm(self.h, W.T).round(self.dtype)

    def narrow_product(self, s, factor):
        """The product of ``s`` and a factor, before the rounding to the dtype of the logits."""
        return narrow_product(s, factor, self.dtype, self.wide)

    def run(self, reduction, grad):
        """Bounds of the results by name, for the gradient ``grad`` of the output."""
        per_row = reduction == "none"
        factor = grad.flatten() if per_row else None
        loss, _, dz = row_bounds(
            self.z, self.target, self.block_v, self.row_loss, self.dtype, factor
        )
        ds = ((dz @ self.B) * self.lora_scale).round(self.wide)
        update = self.narrow_product(ds, self.A).round(self.dtype)
        dhidden = update.addmm(dz, Bound.of(self.tensors["weight"])).round(self.dtype)
        grads = {
            "hidden": dhidden.round(self.tensors["hidden"].dtype),
            "weight": dz.T @ self.h,
            "bias": dz.sum(0),
            "A": ds.T @ self.h,
            "B": (dz.T @ self.s) * self.lora_scale,
        }
        if not per_row:
            loss = loss.sum(0)
            scale = constant(1.0)
            if reduction == "mean":
                count = max(int((self.target >= 0).sum()), 1)
                loss, scale = (v.map(lambda t: t / count, 1 / count, 1.0) for v in (loss, scale))
            scale = scale * exact(grad)
            grads = {name: value * scale for name, value in grads.items()}
        results = {"loss": loss.reshape(*grad.shape)}
        for name, value in grads.items():
            results[name] = value.round(self.tensors[name].dtype)
        return results
