"""The public function: checks and choice of backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkit_kernels.core.checks import (
    check_bias,
    check_counts,
    check_lora,
    check_weight,
    is_autocast_enabled,
)
from peftkit_kernels.core.dispatch import Backend, choose_backend, triton_obstacle
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.attention import causal
from peftkit_kernels.ops.frozen_norm.config import obstacle as norm_obstacle
from peftkit_kernels.ops.lora_decoder_layer import schedule
from peftkit_kernels.ops.lora_decoder_layer.reference import Norm, lora_decoder_layer_reference
from peftkit_kernels.ops.lora_decoder_layer.torch_impl import lora_decoder_layer_torch
from peftkit_kernels.ops.lora_linear.schedule import Linear
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS
from peftkit_kernels.storage.quantized import Weight, tensors_of

Remake = Literal["", "gate", "most"]
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def lora_decoder_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Norm],
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str = "silu",
    *,
    scale: float,
    remake: Remake = "",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder layer of the Llama kind: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, dense and causal.

    Queries and keys are rotated by ``cos`` and ``sin``. Everything but the adapters is frozen. Kept for backward: ``x``, the sum
    between the halves, the rotated queries and keys, the values, the attention's output, the outputs of gate and up, and the
    rank-r projections; less what ``remake`` names. That changes memory and time, not the formula.

    Args:
        x: ``[B, S, D]``.
        cos: ``[B or 1, S, head size]``.
        sin: As ``cos``.
        norms: The norm before attention and that before the MLP; then, if heads are normalised before the rotation, the norm
            of each query and that of each key.
        weights: q, k, v ``[heads · head size, D]``, o ``[D, heads · head size]``, gate, up ``[F, D]``, down ``[D, F]``: tensors or
            quantised weights.
        biases: One or ``None`` for each linear, frozen.
        loras: One or ``None`` for each linear.
        act: One of ``lora_swiglu_mlp.ACTIVATIONS``.
        scale: Factor on the scores of attention.
        remake: What the backward computes again instead of keeping it: ``""`` nothing, ``"gate"`` the output of gate, ``"most"`` those of
            gate, up, q, k and v. Other backends than Triton keep the input alone for any but the first.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        The output ``[B, S, D]``, the rotated keys and the values, ``[B, key heads, S, head size]``, as a cache keeps them.

    Raises:
        ValueError: Shapes or dtypes do not fit, a frozen tensor requires a gradient, or the backend cannot run.
    """
    S, head_size = x.shape[-2], cos.shape[-1]
    kernel = causal.kernel_for(x, S, head_size)
    check_counts(weights, biases, loras)
    linears = list(map(Linear, weights, biases, loras))
    call = None
    if kernel is not None:
        call = schedule.Layer(x, cos, sin, list(norms), linears, act, scale, kernel, remake)
    if backend == "auto" and call is not None and replays(x):
        found = schedule.lora_decoder_layer.again(call)
        if found is not None:
            return found
    rank = _check(x, cos, sin, norms, weights, biases, loras, act, remake)
    factors = [t for lora in loras if lora is not None for t in (lora.A, lora.B)]
    frozen = [norm.weight for norm in norms]
    chosen = choose_backend(
        *(
            "lora_decoder_layer",
            backend,
            x,
            cos,
            sin,
            *frozen,
            *tensors_of(weights),
            *biases,
            *factors,
        ),
        rank=rank,
        own_obstacle=_own_obstacle(x, S, head_size),
    )
    if chosen == "triton" and call is not None:
        return schedule.lora_decoder_layer(chosen, call)
    run = lora_decoder_layer_reference if chosen == "reference" else lora_decoder_layer_torch
    if remake:
        run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return run(x, cos, sin, norms, weights, biases, loras, act, scale)


def obstacle(x: Tensor, length: int, head_size: int, rank: int) -> str | None:
    """Why a layer does not run as one op on Triton, as a sentence, or ``None``.

    Args:
        x: The input, ``[B, S, D]``.
        length: ``S``.
        head_size: Features of a head.
        rank: The largest rank of the adapters.
    """
    own = _own_obstacle(x, length, head_size)
    return triton_obstacle("lora_decoder_layer", x, rank=rank, own_obstacle=own)


def _own_obstacle(x: Tensor, length: int, head_size: int) -> str | None:
    if is_autocast_enabled(x.device.type):
        return "autocast is on"
    return causal.obstacle(x, length, head_size) or norm_obstacle("frozen_rms_norm", x.shape[-1])


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Norm],
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str,
    remake: str,
) -> int:
    """Raise ``ValueError`` unless the arguments form a layer; returns the largest rank."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if remake not in schedule.REMADE:
        known = ", ".join(map(repr, schedule.REMADE))
        raise ValueError(f"remake={remake!r} is unknown; use one of {known}")
    if len(weights) != len(LINEARS) or len(norms) not in (2, 4):
        raise ValueError(
            f"there are {len(weights)} weights and {len(norms)} norms; a layer has seven linears "
            f"({', '.join(LINEARS)}) and two norms, or four with those of queries and keys"
        )
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, S, D]")
    B, S, D = x.shape
    head_size = cos.shape[-1]
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 3 or t.shape[0] not in (1, B) or t.shape[1] != S or t.shape[2] != head_size:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)} and x {tuple(x.shape)}; it must be [B or 1, S, head size]"
            )
        if t.stride(2) != 1:
            raise ValueError(f"{name} has strides {t.stride()}; its last axis must be contiguous")
    q, k, v, o, gate, up, down = (tuple(weight.shape) for weight in weights)
    inner, keys, F = q[0], k[0], gate[0]
    fits = (
        (q, k, v, o) == ((inner, D), (keys, D), (keys, D), (D, inner))
        and (gate, up, down) == ((F, D), (F, D), (D, F))
        and head_size % 2 == 0
        and inner % head_size == keys % head_size == 0
        and inner % keys == 0
    )
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(weight.shape)}" for name, weight in zip(LINEARS, weights, strict=True)
        )
        raise ValueError(
            f"weights: {shapes} do not form a layer of width {D} with heads of size {head_size}"
        )
    for i, norm in enumerate(norms):
        width = D if i < 2 else head_size
        if norm.weight.shape != (width,) or norm.weight.requires_grad:
            raise ValueError(f"norms[{i}]: its weight must be [{width}] and frozen")
    if norms[2:]:
        of_q, of_k = norms[2:]
        if of_q[1:] != of_k[1:] or {of_q.weight.dtype, of_k.weight.dtype} != {x.dtype}:
            raise ValueError(
                f"norms[2:]: those of queries and keys must have the dtype of x, {x.dtype}, and agree in all but their weights"
            )
    inputs = {"o": inner, "down": F}
    for name, weight, bias, lora in zip(LINEARS, weights, biases, loras, strict=True):
        # only the width of the input matters
        check_weight(x.new_empty(0, inputs.get(name, D)), weight, f"weights ({name})")
        check_bias(bias, weight, f"biases ({name})")
        if bias is not None and bias.requires_grad:
            raise ValueError(f"biases ({name}): it requires a gradient; freeze it")
        if lora is not None:
            check_lora(lora, weight, f"loras ({name})")
    return max([0, *(lora.A.shape[0] for lora in loras if lora is not None)])
