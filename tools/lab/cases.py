"""One case of every operation, at any size and on any device. The tools check, count, predict and time these cases.

A case uses public functions only, so a new operation needs an entry in ``OPERATIONS`` and nothing else here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.case import Case, Draw, Sizes, Tensors
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.attention import attention
from peftkit_kernels.ops.bottleneck import bottleneck
from peftkit_kernels.ops.dora import dora_linear
from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_scale
from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.ops.grouped_lora import grouped_lora, plan_groups
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.ops.linear_cross_entropy import linear_cross_entropy
from peftkit_kernels.ops.lora_decoder_layer import Norm, lora_decoder_layer
from peftkit_kernels.ops.lora_decoder_layer.reference import rotated
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.ops.prefix_attention import prefix_attention
from peftkit_kernels.ops.quantized_linear import fp8_linear, int8_linear, nf4_linear
from peftkit_kernels.storage.fp8 import dequantize_fp8, quantize_fp8
from peftkit_kernels.storage.int8 import dequantize_int8, quantize_int8
from peftkit_kernels.storage.nf4 import dequantize_nf4, quantize_nf4
from peftkit_kernels.storage.requantized import RequantizedWeight

FACTOR = 4.0
"""A result is wrong if its error is more than this many times that of plain torch. The backward of flash attention recomputes
probabilities from rounded numbers and has up to three times that error; a bug has thousands of times. The tests check each op
against its own bound."""
_SCALE = 2.0
_SEED = 2**62 + 7
_HEAD_SIZE = 64
_ADAPTERS = 4
_PREFIX = 16


def _lora(leaves: Tensors, sizes: Sizes, suffix: str = "", seed: int = _SEED) -> LoRA:
    parts = leaves[f"A{suffix}"], leaves[f"B{suffix}"]
    return LoRA(*parts, _SCALE, sizes.p, seed if sizes.p else 0)


def _plain_linear(t: Tensors, x: Tensor, sizes: Sizes, suffix: str = "") -> Tensor:
    """PEFT's layer, with the dropout that is one kernel on a GPU."""
    dropped = torch.native_dropout(x, sizes.p, True)[0] if sizes.p else x
    s = F.linear(dropped, t[f"A{suffix}"].to(x.dtype))
    update = F.linear(s, t[f"B{suffix}"].to(x.dtype))
    return F.linear(x, t[f"weight{suffix}"]) + update * _SCALE


def _lora_linear(sizes: Sizes, draw: Draw) -> Case:
    leaves = {"x": draw(sizes.M, sizes.K, trained=True), "weight": draw.weight(sizes.N, sizes.K)}
    return Case(
        leaves | draw.adapter(sizes.N, sizes.K, sizes.R),
        lambda t, backend: lora_linear(t["x"], t["weight"], None, _lora(t, sizes), backend=backend),
        lambda t: _plain_linear(t, t["x"], sizes),
        lambda t: F.linear(t["x"], t["weight"]),
    )


def _lora_qkv(sizes: Sizes, draw: Draw) -> Case:
    widths = {"_q": sizes.N, "_k": sizes.N // 4, "_v": sizes.N // 4}
    leaves = {"x": draw(sizes.M, sizes.K, trained=True)}
    for suffix, width in widths.items():
        leaves[f"weight{suffix}"] = draw.weight(width, sizes.K)
        leaves |= draw.adapter(width, sizes.K, sizes.R, suffix)

    def call(t: Tensors, backend: Any) -> tuple[Tensor, ...]:
        weights = [t[f"weight{suffix}"] for suffix in widths]
        loras = [_lora(t, sizes, suffix) for suffix in widths]
        return lora_qkv(t["x"], weights, [None] * 3, loras, backend=backend)

    return Case(
        leaves,
        call,
        lambda t: tuple(_plain_linear(t, t["x"], sizes, suffix) for suffix in widths),
        lambda t: tuple(F.linear(t["x"], t[f"weight{suffix}"]) for suffix in widths),
    )


def _lora_swiglu_mlp(sizes: Sizes, draw: Draw) -> Case:
    """A gated MLP whose gate and up are in one buffer, where ``accelerate`` puts them on a GPU."""
    K, N = sizes.K, sizes.N
    shapes = {"_gate": (N, K), "_up": (N, K), "_down": (K, N)}
    leaves = {"x": draw(sizes.M, K, trained=True)}
    leaves |= {"weight_gate_up": draw.weight(2 * N, K), "weight_down": draw.weight(K, N)}
    for suffix, shape in shapes.items():
        leaves |= draw.adapter(*shape, sizes.R, suffix)

    def cut(t: Tensors) -> Tensors:
        gate, up = t["weight_gate_up"].split(N)
        return t | {"weight_gate": gate, "weight_up": up}

    def call(t: Tensors, backend: Any) -> Tensor:
        weights = [cut(t)[f"weight{suffix}"] for suffix in shapes]
        loras = [_lora(t, sizes, suffix, _SEED + i // 2) for i, suffix in enumerate(shapes)]
        return lora_swiglu_mlp(t["x"], weights, [None] * 3, loras, backend=backend)

    def plain(t: Tensors) -> Tensor:
        t = cut(t)
        gate, up = (_plain_linear(t, t["x"], sizes, suffix) for suffix in ("_gate", "_up"))
        return _plain_linear(t, F.silu(gate) * up, sizes, "_down")

    def frozen(t: Tensors) -> Tensor:
        t = cut(t)
        gate, up = (F.linear(t["x"], t[f"weight{suffix}"]) for suffix in ("_gate", "_up"))
        return F.linear(F.silu(gate) * up, t["weight_down"])

    # act(gate) up reads two [M, N] and writes one; its gradient reads three and writes two
    return Case(
        leaves, call, plain, frozen, frozen_bytes=8 * sizes.M * N * leaves["x"].element_size()
    )


def _linear_cross_entropy(sizes: Sizes, draw: Draw, *, adapter: bool = False) -> Case:
    target = draw.integers(sizes.M, sizes.N)
    leaves = {
        "hidden": draw(sizes.M, sizes.K, trained=True),
        "weight": draw.weight(sizes.N, sizes.K),
    }
    if adapter:
        leaves |= draw.adapter(sizes.N, sizes.K, sizes.R)
    frozen = replace(sizes, p=0.0)

    def call(t: Tensors, backend: Any, reduction: Any = "mean") -> Tensor:
        options = {"lora": _lora(t, frozen) if adapter else None, "reduction": reduction}
        return linear_cross_entropy(t["hidden"], t["weight"], target, backend=backend, **options)

    def plain(t: Tensors) -> Tensor:
        h = t["hidden"]
        z = _plain_linear(t, h, frozen) if adapter else F.linear(h, t["weight"])
        return F.cross_entropy(z.float() if z.dtype.itemsize < 4 else z, target)

    return Case(leaves, call, plain, by_rows=lambda t, backend: call(t, backend, "none"))


def _rms_norm(sizes: Sizes, draw: Draw) -> Case:
    leaves = {"x": draw(sizes.M, sizes.K, trained=True), "weight": draw(sizes.K)}
    return Case(
        leaves, lambda t, backend: frozen_rms_norm(t["x"], t["weight"], 1e-6, backend=backend)
    )


def _layer_norm(sizes: Sizes, draw: Draw) -> Case:
    leaves = {"x": draw(sizes.M, sizes.K, trained=True), "weight": draw(sizes.K)}
    leaves["bias"] = draw(sizes.K)
    return Case(leaves, lambda t, backend: frozen_layer_norm(*t.values(), 1e-5, backend=backend))


def _bottleneck(sizes: Sizes, draw: Draw) -> Case:
    K, R = sizes.K, sizes.R
    leaves = {
        "h": draw(sizes.M, K, trained=True),
        "down": draw(R, K, trained=True, size=K**-0.5, dtype=draw.factors),
        "down_bias": draw(R, trained=True, dtype=draw.factors),
        "up": draw(K, R, trained=True, size=R**-0.5, dtype=draw.factors),
        "up_bias": draw(K, trained=True, dtype=draw.factors),
    }
    return Case(leaves, lambda t, backend: bottleneck(*t.values(), _SCALE, "relu", backend=backend))


def _dora(sizes: Sizes, draw: Draw) -> Case:
    leaves = {"x": draw(sizes.M, sizes.K, trained=True), "weight": draw.weight(sizes.N, sizes.K)}
    leaves |= draw.adapter(sizes.N, sizes.K, sizes.R)
    magnitude = draw(sizes.N, dtype=draw.factors).abs() + 0.5
    leaves["magnitude"] = magnitude.requires_grad_()

    def call(t: Tensors, backend: Any) -> Tensor:
        lora = _lora(t, sizes)
        return dora_linear(t["x"], t["weight"], None, lora, t["magnitude"], backend=backend)

    return Case(leaves, call)


def _scale_leaves(sizes: Sizes, draw: Draw, suffix: str = "") -> Tensors:
    """A direction, and the vectors that turn it into the output of a DoRA linear."""
    wide = torch.promote_types(draw.factors, torch.float32)
    magnitude = draw(sizes.N, dtype=draw.factors).abs() + 0.5
    return {
        f"z{suffix}": draw(sizes.M, sizes.N, trained=True),
        f"norm{suffix}": draw(sizes.N, dtype=wide).abs() + 0.5,
        f"bias{suffix}": draw(sizes.N),
        f"magnitude{suffix}": magnitude.requires_grad_(),
    }


def _scale(t: Tensors, suffix: str = "") -> Scale:
    return Scale(*(t[name + suffix] for name in Scale._fields))


def _dora_scale(sizes: Sizes, draw: Draw) -> Case:
    return Case(
        _scale_leaves(sizes, draw),
        lambda t, backend: dora_scale(t["z"], _scale(t), backend=backend),
    )


def _dora_gate(sizes: Sizes, draw: Draw) -> Case:
    leaves = _scale_leaves(sizes, draw, "_gate") | _scale_leaves(sizes, draw, "_up")

    def call(t: Tensors, backend: Any) -> Tensor:
        scales = _scale(t, "_gate"), _scale(t, "_up")
        return dora_gate((t["z_gate"], t["z_up"]), scales, backend=backend)

    return Case(leaves, call)


def _grouped_lora(sizes: Sizes, draw: Draw) -> Case:
    E, K, N, R = _ADAPTERS, sizes.K, sizes.N, sizes.R
    leaves = {
        "y": draw(sizes.M, N),
        "x": draw(sizes.M, K, trained=True),
        "A": draw(E, R, K, trained=True, size=K**-0.5, dtype=draw.factors),
        "B": draw(E, N, R, trained=True, size=R**-0.5, dtype=draw.factors),
    }
    scale = draw(E, dtype=torch.float32)
    plan = plan_groups(draw.integers(sizes.M, E), E)
    return Case(leaves, lambda t, backend: grouped_lora(*t.values(), scale, plan, backend=backend))


def _quantized(sizes: Sizes, draw: Draw, op: Any, quantize: Any) -> Case:
    weight = draw(sizes.N, sizes.K, size=sizes.K**-0.5, dtype=torch.float32)
    stored = quantize(weight)
    leaves = {"x": draw(sizes.M, sizes.K, trained=True)}
    leaves |= draw.adapter(sizes.N, sizes.K, sizes.R)
    return Case(
        leaves,
        lambda t, backend: op(t["x"], stored, None, _lora(t, sizes), backend=backend),
    )


def _requantized(sizes: Sizes, draw: Draw) -> Case:
    leaves = {"x": draw(sizes.M, sizes.K, trained=True), "weight": draw.weight(sizes.N, sizes.K)}

    def run(t: Tensors, backend: Any) -> Any:
        lora = _lora(t, sizes)
        weight = RequantizedWeight.merging(t["weight"], lora, "nf4")
        return lora_qkv(t["x"], [weight], [None], [lora], backend=backend)

    return Case(leaves | draw.adapter(sizes.N, sizes.K, sizes.R), run)


def _dequantized(sizes: Sizes, draw: Draw, quantize: Any, dequantize: Any) -> Case:
    stored = quantize(draw(sizes.N, sizes.K, dtype=torch.float32))
    like = draw(1)  # has the dtype to decode to
    return Case(
        {"like": like},
        lambda t, backend: dequantize(stored, t["like"].dtype, backend=backend),
    )


def _heads(sizes: Sizes, draw: Draw) -> Tensors:
    heads = max(1, sizes.K // _HEAD_SIZE)
    groups = max(1, heads // 4)
    shapes = {"q": heads, "k": groups, "v": groups}
    return {name: draw(1, n, sizes.M, _HEAD_SIZE, trained=True) for name, n in shapes.items()}


def _attention(sizes: Sizes, draw: Draw) -> Case:
    scale = _HEAD_SIZE**-0.5
    return Case(
        _heads(sizes, draw),
        lambda t, backend: attention(*t.values(), scale, causal=True, backend=backend),
    )


def _prefix_attention(sizes: Sizes, draw: Draw, *, gated: bool = False) -> Case:
    leaves = _heads(sizes, draw)
    shape = leaves["k"].shape[1], _PREFIX, _HEAD_SIZE
    for name in ("prefix_k", "prefix_v"):
        leaves[name] = draw(*shape, trained=True, dtype=draw.factors)
    if gated:
        leaves["gate"] = draw(leaves["q"].shape[1], trained=True, dtype=draw.factors)

    def call(t: Tensors, backend: Any) -> Tensor:
        parts = [t[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]
        return prefix_attention(
            *parts, _HEAD_SIZE**-0.5, causal=True, gate=t.get("gate"), backend=backend
        )

    return Case(leaves, call)


def _lora_decoder_layer(sizes: Sizes, draw: Draw) -> Case:
    """A layer of width K and inner width N, with a quarter as many key heads as heads."""
    heads = max(4, 4 * (sizes.K // (4 * _HEAD_SIZE)))
    inner, keys = heads * _HEAD_SIZE, heads // 4 * _HEAD_SIZE
    D, width = sizes.K, sizes.N
    shapes = {
        **{"_q": (inner, D), "_k": (keys, D), "_v": (keys, D), "_o": (D, inner)},
        **{"_gate": (width, D), "_up": (width, D), "_down": (D, width)},
    }
    leaves = {"x": draw(1, sizes.M, D, trained=True)}
    for name in ("cos", "sin"):
        leaves[name] = draw(1, sizes.M, _HEAD_SIZE)
    leaves |= {name: draw.weight(1, D)[0] for name in ("norm1", "norm2")}
    for suffix, shape in shapes.items():
        leaves[f"weight{suffix}"] = draw.weight(*shape)
        leaves |= draw.adapter(*shape, sizes.R, suffix)

    def call(t: Tensors, backend: Any) -> tuple[Tensor, ...]:
        return lora_decoder_layer(
            *(t["x"], t["cos"], t["sin"]),
            [Norm(t["norm1"], 1e-5, 1.0), Norm(t["norm2"], 1e-5, 1.0)],
            [t[f"weight{suffix}"] for suffix in shapes],
            [None] * len(shapes),
            [_lora(t, sizes, suffix, _SEED + i) for i, suffix in enumerate(shapes)],
            scale=_HEAD_SIZE**-0.5,
            backend=backend,
        )

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (D,), 1.0 + t[name], 1e-5)

        def linear(x: Tensor, suffix: str) -> Tensor:
            return _plain_linear(t, x, sizes, suffix)

        x, h = t["x"], norm(t["x"], "norm1")
        q, k, v = (
            linear(h, suffix).unflatten(-1, (-1, _HEAD_SIZE)).transpose(1, 2)
            for suffix in ("_q", "_k", "_v")
        )
        q, k = rotated(q, t["cos"], t["sin"]), rotated(k, t["cos"], t["sin"])
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(o.transpose(1, 2).flatten(2), "_o")
        h = norm(x, "norm2")
        return x + linear(F.silu(linear(h, "_gate")) * linear(h, "_up"), "_down"), k, v

    return Case(leaves, call, plain)


Build = Callable[[Sizes, Draw], Case]


@dataclass(frozen=True)
class Operation:
    """One operation of the package.

    Attributes:
        keeps: The tensors kept for backward, in words.
        variants: Its public functions or their modes by name, and the function that builds a case of each.
    """

    keeps: str
    variants: Mapping[str, Build]


OPERATIONS: dict[str, Operation] = {
    "lora_linear": Operation("its input and `s = x Aᵀ`", {"lora_linear": _lora_linear}),
    "lora_qkv": Operation("the input once, and each `s`", {"lora_qkv": _lora_qkv}),
    "lora_swiglu_mlp": Operation(
        "the input, both projections, and each `s`", {"lora_swiglu_mlp": _lora_swiglu_mlp}
    ),
    "frozen_norm": Operation(
        "the input and one or two numbers for each row",
        {"frozen_rms_norm": _rms_norm, "frozen_layer_norm": _layer_norm},
    ),
    "attention": Operation(
        "q, k, v, the output and one number for each row", {"attention": _attention}
    ),
    "nf4": Operation(
        "",
        {"dequantize_nf4": lambda s, d: _dequantized(s, d, quantize_nf4, dequantize_nf4)},
    ),
    "int8": Operation(
        "",
        {"dequantize_int8": lambda s, d: _dequantized(s, d, quantize_int8, dequantize_int8)},
    ),
    "fp8": Operation(
        "",
        {"dequantize_fp8": lambda s, d: _dequantized(s, d, quantize_fp8, dequantize_fp8)},
    ),
    "requantized": Operation("as `lora_linear`", {"into nf4": _requantized}),
    "quantized_linear": Operation(
        "as `lora_linear`; never the decoded weight",
        {
            "nf4_linear": lambda s, d: _quantized(s, d, nf4_linear, quantize_nf4),
            "int8_linear": lambda s, d: _quantized(s, d, int8_linear, quantize_int8),
            "fp8_linear": lambda s, d: _quantized(s, d, fp8_linear, quantize_fp8),
        },
    ),
    "int8_compute_linear": Operation(
        "as `lora_linear`; no codes",
        {"int8_compute_linear": lambda s, d: _quantized(s, d, int8_compute_linear, quantize_int8)},
    ),
    "bottleneck": Operation("`h` and the input of the activation", {"bottleneck": _bottleneck}),
    "lora_decoder_layer": Operation(
        "its input, the sum between its halves, q, k, v, the attention's output, gate and up, and each `s`; under checkpointing less",
        {"lora_decoder_layer": _lora_decoder_layer},
    ),
    "prefix_attention": Operation(
        "its arguments, the output and one number for each row",
        {
            "prefix_attention": _prefix_attention,
            "prefix_attention, gated": lambda s, d: _prefix_attention(s, d, gated=True),
        },
    ),
    "grouped_lora": Operation("its input and `s`", {"grouped_lora": _grouped_lora}),
    "dora": Operation("as `lora_linear`, and its output", {"dora_linear": _dora}),
    "dora_scale": Operation(
        "the direction `z`", {"dora_scale": _dora_scale, "dora_gate": _dora_gate}
    ),
    "linear_cross_entropy": Operation(
        "the gradients, computed in the forward",
        {
            "linear_cross_entropy": _linear_cross_entropy,
            "linear_cross_entropy, LoRA": lambda s, d: _linear_cross_entropy(s, d, adapter=True),
        },
    ),
}
"""By the names of the operations' folders."""


def build(
    op: str,
    variant: str,
    sizes: Sizes,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    factors: torch.dtype | None = None,
) -> Case:
    """The case of one variant.

    Args:
        op: A key of ``OPERATIONS``.
        variant: A key of its ``variants``.
        sizes: The sizes.
        dtype: Dtype of the activations and dense weights.
        device: Device of the tensors; on ``"meta"`` they have no values.
        factors: Dtype of the adapters; ``None`` means ``dtype``.
    """
    return OPERATIONS[op].variants[variant](sizes, Draw(dtype, device, factors))


def chosen(names: list[str] | None, among: Mapping[str, Any] | list[str]) -> list[str]:
    """``names``, or all of ``among``.

    Raises:
        ValueError: A name is unknown.
    """
    known = list(among)
    for name in names or []:
        if name not in known:
            raise ValueError(f"op={name!r} is unknown; use one of {', '.join(known)}")
    return list(names or known)
