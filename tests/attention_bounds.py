"""Error bounds of flash attention with or without a prefix, for the roundings of any online softmax with float32 sums."""

import torch

from lab.testing import UNIT_ROUNDOFF, Bound

EXP_ULPS, LOG_ULPS = 2.0, 2.0
"""Largest errors in ulps, for the native passes (``native/exp.h``), torch's vectorised functions and a GPU's exp2."""
KEYS_A_BLOCK, QUERIES_A_BLOCK = 64, 32
"""The smallest blocks of any pass. In each block a running sum is rescaled, and a 16-bit gradient is stored and added to."""


def exact(value, unit=UNIT_ROUNDOFF[torch.float32]):
    return Bound(value.double(), torch.zeros_like(value, dtype=torch.float64), unit)


def constant(value):
    return exact(torch.tensor(value, dtype=torch.float64)).round(torch.float32)


def transposed(bound):
    return Bound(bound.value.mT, bound.error.mT, bound.unit)


def exp(argument, ulps=EXP_ULPS):
    return argument.map(torch.exp, torch.exp(argument.value + argument.error), ulps, torch.exp)


def where(condition, bound, other):
    """``bound`` where ``condition`` is true, elsewhere the exact number ``other``, which may be infinite."""
    value = torch.where(condition, bound.value, other)
    return Bound(value, torch.where(condition, bound.error, 0.0), bound.unit)


class Part:
    """One pass of queries ``[B, H, S, D]`` over keys ``[B, H, T, D]`` with the mask ``visible [B, 1, S, T]``."""

    def __init__(self, q, k, v, scale, visible, dtype):
        self.q, self.k, self.v, self.scale, self.dtype = q, k, v, constant(scale), dtype
        self.visible, self.seeing = visible, visible.any(-1, keepdim=True)
        self.scores = (q @ transposed(k)) * self.scale

    def narrow(self, bound):
        """The operand of a product; 16-bit passes round it."""
        return bound if self.dtype is torch.float32 else bound.round(self.dtype)

    def forward(self):
        """``(out, lse)``. A query without visible keys has output 0 and a meaningless log-sum-exp."""
        seen = where(self.visible, self.scores, -torch.inf).value
        top = torch.where(self.seeing, seen.amax(-1, keepdim=True), 0.0)
        lowest = torch.where(self.visible, self.scores.value, torch.inf).amin(-1, keepdim=True)
        spread = torch.where(self.seeing, top - lowest, 0.0).max() + 2 * self.scores.error.max()
        # in each block a running sum is multiplied by exp(old - new maximum), with an exponential and two roundings
        blocks = -(-self.visible.shape[-1] // KEYS_A_BLOCK)
        shifted = where(self.visible, self.scores - exact(top), 0.0)
        e = exp(shifted, (blocks + 1) * (EXP_ULPS + 1 + float(spread))) * self.visible
        total = e.sum(-1, keepdim=True) + exact((~self.seeing).double())
        least = total.value - total.error
        out = (self.narrow(e) @ self.v) * total.map(torch.reciprocal, least**-2, 1.0)
        lse = total.map(torch.log, 1 / least, LOG_ULPS) + exact(top)
        return out.round(self.dtype), lse

    def backward(self, dout, out, lse):
        """``(dq, dk, dv)``, each ``[B, H, ...]``. ``out`` and ``lse`` are those of the whole attention that the pass is a part of."""
        argument = where(self.visible, self.scores - lse, 0.0)
        p = exp(argument) * self.visible
        ds = p * (dout @ transposed(self.v) - (dout * out).sum(-1, keepdim=True))
        ds, p = self.narrow(ds), self.narrow(p)
        dq = (ds @ self.k) * self.scale
        return dq, transposed(ds) @ self.q * self.scale, transposed(p) @ dout


def merged(first, second, seeing, dtype):
    """Output and log-sum-exp of both parts together. In the second part every key is visible."""
    (o1, l1), (o2, l2) = first, second
    l1 = where(seeing, l1, -torch.inf)
    value = torch.logaddexp(l1.value, l2.value)
    # the error of a log-sum-exp is at most that of its inputs plus that of its evaluation
    size = 1 + torch.maximum(l1.value.where(seeing, 0.0).abs(), l2.value.abs())
    error = torch.maximum(l1.error, l2.error) + (EXP_ULPS + LOG_ULPS + 3) * l2.unit * size
    lse = Bound(value, error, l2.unit)
    w1 = exp(where(seeing, l1 - lse, 0.0)) * seeing
    # also covers weights computed as e / total instead of exp(l - L): the error of the quotient is that of two exponentials
    out = o1 * w1 + o2 * exp(l2 - lse, 2 * EXP_ULPS + 2)
    return out.round(dtype), lse


def per_key_head(grad, heads):
    """The sum over the query heads of each key head: ``[B, H, T, D]`` to ``[B, H_kv, T, D]``."""
    B, H, T, D = grad.value.shape
    return grad.reshape(B, heads, H // heads, T, D).sum(2)


def attention_bounds(leaves, dout, scale, visible, *, gate=None):
    """Bounds of every result by name, for q, k, v and, if present, prefix_k, prefix_v and gate."""
    tensors = {name: t.detach() for name, t in leaves.items()}
    dtype, (B, H, S, _), heads = tensors["q"].dtype, tensors["q"].shape, tensors["k"].shape[1]
    group = H // heads
    # a 16-bit gradient of keys is rounded for each block of queries and each head, so only one of each is allowed here
    assert dtype is torch.float32 or (S <= QUERIES_A_BLOCK and group == 1)

    def keys(name):
        return Bound.of(tensors[name].repeat_interleave(group, 1))

    q, dout = Bound.of(tensors["q"]), Bound.of(dout.transpose(1, 2).to(dtype))
    own = Part(q, keys("k"), keys("v"), scale, visible.expand(B, 1, S, visible.shape[-1]), dtype)
    parts = {"": (own, *own.forward())}
    if "prefix_k" in tensors:
        before = [
            tensors[name].to(dtype).expand(B, *tensors[name].shape).repeat_interleave(group, 1)
            for name in ("prefix_k", "prefix_v")
        ]
        everything = torch.ones(B, 1, S, before[0].shape[2], dtype=torch.bool)
        prefix = Part(q, *(Bound.of(t) for t in before), scale, everything, dtype)
        parts["prefix_"] = (prefix, *prefix.forward())
    results, douts = {}, dict.fromkeys(parts, dout)
    if "gate" in tensors:
        g = Bound.of(tensors["gate"][:, None, None])
        o2 = parts["prefix_"][1]
        results["out"] = (parts[""][1] + o2 * g).round(dtype)
        dgate = (dout * o2).sum(3).sum(2).sum(0)
        results["gate"] = dgate.round(tensors["gate"].dtype)
        douts["prefix_"] = (dout * g).round(dtype)
    elif "prefix_k" in tensors:
        out, lse = merged(parts[""][1:], parts["prefix_"][1:], own.seeing, dtype)
        parts = {name: (part, out, lse) for name, (part, *_) in parts.items()}
        results["out"] = out
    else:
        results["out"] = parts[""][1]
    dq = None
    for name, (part, out, lse) in parts.items():
        share, dk, dv = part.backward(douts[name], out, lse)
        share = share.round(dtype)
        dq = share if dq is None else (dq + share).round(dtype)
        for kind, grad in (("k", dk), ("v", dv)):
            grad = per_key_head(grad, heads).round(dtype)
            if name:
                grad = grad.sum(0)
            results[name + kind] = grad.round(tensors[name + kind].dtype)
    results["q"] = dq
    results["out"] = Bound(
        results["out"].value.transpose(1, 2), results["out"].error.transpose(1, 2), q.unit
    )
    return results
