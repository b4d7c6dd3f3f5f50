"""Every op with an adapter, and PEFT's own eager layer, whose error is the measure for the op in each pair of dtypes."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from lora_cases import draw
from op_cases import Case, build

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear_reference
from peftkit_kernels.ops.linear_cross_entropy import linear_cross_entropy
from peftkit_kernels.storage.quantized import dequantize_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAIRS = [(x, factors) for x in DTYPES for factors in DTYPES]
"""Pairs of dtypes: that of the frozen weights and activations, and that of the factors."""
ROWS, SCALE, RANK = (6, 40), 1.7, 4


def update(x, A, B):
    """The adapter's output in the dtype of its factors, to which PEFT casts the input."""
    return F.linear(F.linear(x.to(A.dtype), A), B) * SCALE


def linear(leaves, x, suffix=""):
    """PEFT's LoRA linear."""
    weight, bias, A, B = (leaves[name + suffix] for name in ("weight", "bias", "A", "B"))
    y = F.linear(x, weight, bias)
    return (y + update(x, A, B)).to(y.dtype)


def _lora_linear(leaves, case):
    return linear(leaves, leaves["x"])


def _lora_qkv(leaves, case):
    return tuple(linear(leaves, leaves["x"], suffix) for suffix in ("_q", "_k", "_v"))


def _lora_swiglu_mlp(leaves, case):
    gate, up = (linear(leaves, leaves["x"], suffix) for suffix in ("_gate", "_up"))
    return linear(leaves, F.silu(gate) * up, "_down")


def _quantized_linear(leaves, case):
    weight = dequantize_reference(case.stored, leaves["x"].dtype)
    return linear(leaves | {"weight": weight}, leaves["x"])


def _int8_compute_linear(leaves, case):
    x = leaves["x"]
    y = int8_compute_linear_reference(x, case.stored, leaves["bias"])
    return (y + update(x, leaves["A"], leaves["B"])).to(y.dtype)


def _dora_linear(leaves, case):
    x, weight, bias, A, B, magnitude = leaves.values()
    y = F.linear(x, weight, bias)
    x = x.to(A.dtype)
    # one row at a time; PEFT uses a product with an identity matrix
    merged = weight.to(x.dtype) + SCALE * (B @ A).to(x.dtype)
    norm = torch.linalg.norm(merged, dim=1).to(x.dtype).detach()
    factor = (magnitude / norm).view(1, -1)
    result = y + (factor - 1) * (y - bias) + factor * F.linear(F.linear(x, A), B) * SCALE
    return result.to(y.dtype)


def _grouped_lora(leaves, case):
    x, y, A, B = leaves.values()
    rows, parts = x.flatten(0, -2), y.flatten(0, -2).clone()
    for e, scale in enumerate(case.stored):
        own = torch.arange(rows.shape[0]) % len(case.stored) == e
        low = F.linear(rows[own].to(A.dtype), A[e])
        parts[own] = parts[own] + (F.linear(low, B[e]) * scale).to(y.dtype)
    return parts.view(y.shape)


def _head(leaves, case, reduction):
    logits = linear(leaves, leaves["x"])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), case.stored, reduction=reduction)


EAGER = {
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "lora_swiglu_mlp": _lora_swiglu_mlp,
    "nf4_linear": _quantized_linear,
    "int8_linear": _quantized_linear,
    "int8_compute_linear": _int8_compute_linear,
    "dora_linear": _dora_linear,
    "dora_linear_keeping_its_direction": _dora_linear,
    "grouped_lora": _grouped_lora,
    "linear_cross_entropy": partial(_head, reduction="mean"),
    "linear_cross_entropy_by_rows": partial(_head, reduction="none"),
}


def make(name, dtype, factors, rows=ROWS):
    """The case of an op. The magnitude of DoRA is trained too."""
    options = {"dtype": dtype, "factors": factors, "scale": SCALE, "rank": RANK}
    if name.startswith("linear_cross_entropy"):
        reduction = "none" if name.endswith("by_rows") else "mean"
        return _head_case(rows, dtype, factors, reduction)
    if not name.startswith("dora_linear"):
        return build(name, rows, **options)
    case = build("dora_linear", rows, **options)
    case.leaves["magnitude"].requires_grad_()
    keep_direction = name != "dora_linear"
    return replace(case, apply=partial(case.apply, keep_direction=keep_direction))


def _head_case(rows, dtype, factors, reduction):
    generator, (V, D) = torch.Generator().manual_seed(0), (50, 33)
    M = torch.Size(rows).numel()
    leaves = {
        "x": draw((M, D), dtype, generator).requires_grad_(),
        "weight": draw((V, D), dtype, generator) / D**0.5,
        "bias": draw((V,), dtype, generator),
        "A": (draw((RANK, D), factors, generator) / D**0.5).requires_grad_(),
        "B": (draw((V, RANK), factors, generator) / 2).requires_grad_(),
    }
    target = torch.randint(V, (M,), generator=generator)

    def apply(leaves, **options):
        x, weight, bias, A, B = leaves.values()
        parts = {"bias": bias, "lora": LoRA(A, B, SCALE), "reduction": reduction}
        return linear_cross_entropy(x, weight, target, **parts, **options)

    return Case(leaves, apply, stored=target)


def results(outputs, leaves, size=1.0):
    """Outputs and gradients by name. The output gradients have the given size and the same values in every dtype."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = []
    for y in outputs:
        grad = draw(tuple(y.shape), torch.float64, generator) * size
        # three bits and a small exponent, so that every dtype here can represent the number
        mantissa, exponent = torch.frexp(grad)
        grads.append(torch.ldexp((mantissa * 8).round() / 8, exponent).to(y.dtype))
    trained = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    values = torch.autograd.grad(outputs, list(trained.values()), grads)
    for value, leaf in zip(values, trained.values(), strict=True):
        assert value.dtype == leaf.dtype
    return {f"output{i}": y.detach() for i, y in enumerate(outputs)} | dict(
        zip(trained, values, strict=True)
    )


def errors(case, name, size=1.0, **options):
    """By name, the relative error of the op, and that of PEFT's eager layer, both against float64.

    The error of a single number is random, so a mean loss is left out.
    """
    eager = EAGER[name]
    actual = results(case.outputs(**options), case.leaves, size)
    plain = results(eager(case.leaves, case), case.leaves, size)
    wide = case.to(torch.float64)
    truth = results(eager(wide.leaves, wide), wide.leaves, size)

    def relative(values, key):
        off = (values[key].double() - truth[key]).norm()
        return float(off / truth[key].norm())

    compared = [key for key, value in truth.items() if value.dim()]
    return {key: (relative(actual, key), relative(plain, key)) for key in compared}
