"""Cases of ``dora_scale`` and ``dora_gate``, and the error bound of every output and gradient."""

import op_cases
import torch
from lora_cases import activation_and_slope, draw, gradients

from lab.testing import Bound
from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_scale

TRAINED = ("z", "magnitude", "bias")
SIDES = ("e", "u")
N = 29


def leaves(
    dtype=torch.float32, own=None, leading=(3, 5), trained=TRAINED, layout="contiguous", N=N
):
    """``z``, magnitude, norm and bias by name. ``own`` is the dtype of the magnitude if it differs."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(own or dtype, torch.float32)
    tensors = {
        "z": draw((*leading, N), dtype, generator, layout),
        "magnitude": draw((N,), own or dtype, generator),
        "norm": draw((N,), wide, generator).abs() + 0.5,
        "bias": draw((N,), dtype, generator),
    }
    return {name: t.requires_grad_(name in trained) for name, t in tensors.items()}


def apply(tensors, **options):
    z, *scale = tensors.values()
    return dora_scale(z, Scale(*scale), **options)


def results(tensors, dy, **options):
    """The output and every gradient by name."""
    y = apply(tensors, **options)
    return {"y": y.detach()} | gradients(y, dy, tensors)


def inverse_of(norm):
    """The bound of ``1 / norm``."""
    norm = Bound.of(norm)
    return norm.map(torch.reciprocal, norm.value.square().reciprocal(), 1.0)


def bounds(tensors, dy):
    """The steps of ``dora_scale`` on bounds, with its roundings."""
    z, magnitude, norm, bias = tensors.values()
    dtype, width = z.dtype, z.shape[-1]
    inverse = inverse_of(norm)
    g = Bound.of(magnitude) * inverse
    z, dy = Bound.of(z).reshape(-1, width), Bound.of(dy).reshape(-1, width)
    return {
        "y": (z * g + Bound.of(bias)).round(dtype),
        "z": (dy * g).round(dtype),
        "magnitude": ((dy * z).sum(0) * inverse).round(magnitude.dtype),
        "bias": dy.sum(0).round(dtype),
    }


def gate_case(
    act,
    dtype=torch.float32,
    magnitudes=(True, True),
    biased=(True, True),
    leading=(17,),
    own=None,
    layout="contiguous",
    N=N,
):
    """An ``op_cases.Case`` with the leaves of a gate by name, and the norms. ``own`` is the dtype of the magnitudes if it differs."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(own or dtype, torch.float32)
    found, norms = {}, []
    for side, has_magnitude, has_bias in zip(SIDES, magnitudes, biased, strict=True):
        found[f"z_{side}"] = draw((*leading, N), dtype, generator, layout)
        if has_bias:
            found[f"bias_{side}"] = draw((N,), dtype, generator)
        if has_magnitude:
            found[f"magnitude_{side}"] = draw((N,), own or dtype, generator)
        norms.append(draw((N,), wide, generator).abs() + 0.5 if has_magnitude else None)
    for leaf in found.values():
        leaf.requires_grad_()

    def op(tensors, **options):
        scales = (
            Scale(tensors.get(f"magnitude_{side}"), norm, tensors.get(f"bias_{side}"))
            for side, norm in zip(SIDES, norms, strict=True)
        )
        return dora_gate((tensors["z_e"], tensors["z_u"]), tuple(scales), act, **options)

    return op_cases.Case(found, op), norms


def gate_bounds(tensors, norms, dh, act):
    """The steps of ``dora_gate`` on bounds. ``e`` and ``u`` are float32; stored results are rounded."""
    dtype, width = dh.dtype, dh.shape[-1]
    dh = Bound.of(dh).reshape(-1, width)
    inverses = [None if norm is None else inverse_of(norm) for norm in norms]
    zs, gs, scaled = [], [], []
    for side, inverse in zip(SIDES, inverses, strict=True):
        z = value = Bound.of(tensors[f"z_{side}"]).reshape(-1, width)
        g = None if inverse is None else Bound.of(tensors[f"magnitude_{side}"]) * inverse
        value = value if g is None else value * g
        if f"bias_{side}" in tensors:
            value = value + Bound.of(tensors[f"bias_{side}"])
        zs.append(z)
        gs.append(g)
        scaled.append(value)
    e, u = scaled
    a, slope = activation_and_slope(e, act)
    expected = {"output0": (a * u).round(dtype)}
    for side, grad, z, g, inverse in zip(
        SIDES, (dh * u * slope, dh * a), zs, gs, inverses, strict=True
    ):
        expected[f"bias_{side}"] = grad.sum(0).round(dtype)
        expected[f"z_{side}"] = (grad if g is None else grad * g).round(dtype)
        if inverse is not None:
            own = tensors[f"magnitude_{side}"].dtype
            expected[f"magnitude_{side}"] = ((grad * z).sum(0) * inverse).round(own)
    return expected
