"""The two passes over ``[M, F]`` of the gate: each function allocates, chooses a configuration and launches.

Rows have one dtype (bfloat16, float16, float32) and are on one device, M > 0; s and ds have ``adapter_dtype``. ``loras`` are
those of gate, up and down, or ``None``; ``s`` and ``ds`` are ``[M, R]`` each. ``config`` replaces the configuration that would
be chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import keep_scale, threshold
from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, step_of, target_of
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.low_rank.passes import Sums, add_up
from peftkit_kernels.ops.lora_swiglu_mlp.config import GateBackwardConfig, GateConfig

Loras = Sequence[LoRA | None]


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.lora_swiglu_mlp import kernels

    return kernels


def gate_forward(
    gate: Tensor,
    up: Tensor,
    s: Sequence[Tensor | None],
    loras: Loras,
    act: str,
    *,
    config: GateConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``h = act(gate + c s Bᵀ) ∘ (up + c s Bᵀ)``, ``[M, F]``, and ``drop(h) Aᵀ`` of the down projection, ``[M, R]``.

    Args:
        gate: ``x Wᵀ + bias`` of the gate projection, without its low-rank update.
        up: The same for the up projection.
        s: ``drop(x) Aᵀ`` of gate and up.
        loras: The adapters of gate, up and down. If down has none, the second result is ``None``.
        act: One of ``ACTIVATIONS``.
        config: Sizes of the tiles.
    """
    (M, F), (gate_lora, up_lora, down_lora) = gate.shape, loras
    p, seed = (down_lora.p, down_lora.seed) if down_lora else (0.0, 0)
    b_gate, b_up, a_down = _b(gate_lora, gate), _b(up_lora, gate), _a(down_lora, gate)
    c = config or GateConfig.choose(
        *(M, F, _block_r(loras)),
        aligned=aligned(gate, up),
        target=target_of(gate),
        mixed=_is_mixed(gate, b_gate, b_up, a_down),
    )
    h = gate.new_empty(M, F)
    blocks = cdiv(F, c.block_f)
    steps = cdiv(blocks, c.splits)
    splits = cdiv(blocks, steps)
    s_down = partial = None
    if a_down is not None:
        s_down = a_down.new_empty(M, a_down.shape[0])
        partial = (
            s_down if splits == 1 else gate.new_empty(splits, *s_down.shape, dtype=torch.float32)
        )
    launch(
        _kernels().gate_forward_kernel,
        (cdiv(M, c.block_m), splits),
        *(gate, up, h, s[0], b_gate, s[1], b_up, a_down, partial),
        *(_scale(gate_lora), _scale(up_lora), keep_scale(p), seed, threshold(p)),
        *(M, F, *(_rank(lora) for lora in loras), steps),
        *(gate.stride(0), up.stride(0), h.stride(0), *(_row_stride(t) for t in s)),
        HAS_GATE_LORA=gate_lora is not None,
        HAS_UP_LORA=up_lora is not None,
        HAS_DOWN_LORA=down_lora is not None,
        DROPOUT=p > 0,
        ACT=act,
        STEP=step_of(*(_rank(lora) for lora in loras), *(_row_stride(t) for t in s)),
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_f,
        BLOCK_R=_block_r(loras),
        PRECISION=dot_precision(gate.dtype, b_gate, b_up, a_down),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if s_down is not None and partial is not None and splits > 1:
        add_up(partial, s_down)
    return h, s_down


def gate_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    s: Sequence[Tensor | None],
    ds: Tensor | None,
    loras: Loras,
    act: str,
    *,
    needs_dA: bool,
    sums: Sums | None = None,
    config: GateBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up (the halves of one ``[M, 2F]``), and dA of the down projection if ``needs_dA``.

    Args:
        dh: ``dy W`` of the down projection, without the part of its low-rank update.
        gate: As in ``gate_forward``. ``h`` is recomputed and not stored.
        up: As in ``gate_forward``.
        s: As in ``gate_forward``.
        ds: ``scale · dy B`` of the down projection.
        loras: The adapters of gate, up and down.
        act: One of ``ACTIVATIONS``.
        needs_dA: Whether to compute dA.
        sums: Computes the sum of dA's partial results later, if given.
        config: Sizes of the tiles.
    """
    (M, F), (gate_lora, up_lora, down_lora) = gate.shape, loras
    p, seed = (down_lora.p, down_lora.seed) if down_lora else (0.0, 0)
    b_gate, b_up, a_down = _b(gate_lora, gate), _b(up_lora, gate), _a(down_lora, gate)
    c = config or GateBackwardConfig.choose(
        *(M, F, _block_r(loras)),
        itemsize=gate.element_size(),
        aligned=aligned(gate, up),
        target=target_of(gate),
        mixed=_is_mixed(gate, b_gate, b_up, a_down),
    )
    d_gate, d_up = gate.new_empty(M, 2 * F).split(F, 1)
    chunks = cdiv(M, c.chunk_m)
    dA = partial = None
    if needs_dA and down_lora is not None:
        dA = down_lora.A.new_empty(down_lora.A.shape)
        partial = dA if chunks == 1 else gate.new_empty(chunks, *dA.shape, dtype=torch.float32)
    launch(
        _kernels().gate_backward_kernel,
        (chunks, cdiv(F, c.block_f)),
        *(gate, up, dh, d_gate, d_up, s[0], b_gate, s[1], b_up),
        *(ds, a_down, partial),
        *(_scale(gate_lora), _scale(up_lora), keep_scale(p), seed, threshold(p)),
        *(M, F, *(_rank(lora) for lora in loras), c.chunk_m),
        *(gate.stride(0), up.stride(0), dh.stride(0), d_gate.stride(0)),
        *(_row_stride(t) for t in (*s, ds)),
        *((0, 0) if partial is None else (0 if chunks == 1 else partial.stride(0), F)),
        HAS_GATE_LORA=gate_lora is not None,
        HAS_UP_LORA=up_lora is not None,
        HAS_DOWN_LORA=down_lora is not None,
        WITH_DA=partial is not None,
        DROPOUT=p > 0,
        ACT=act,
        STEP=step_of(*(_rank(lora) for lora in loras), *(_row_stride(t) for t in (*s, ds))),
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_f,
        BLOCK_R=_block_r(loras),
        PRECISION=dot_precision(gate.dtype, b_gate, b_up, a_down),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if dA is not None and partial is not None and chunks > 1:
        add_up(partial, dA, sums)
    return d_gate, d_up, dA


def _is_mixed(gate: Tensor, *factors: Tensor | None) -> bool:
    return any(factor is not None and factor.dtype is not gate.dtype for factor in factors)


def _a(lora: LoRA | None, gate: Tensor) -> Tensor | None:
    return None if lora is None else cast(lora.A, adapter_dtype(gate, lora.A)).contiguous()


def _b(lora: LoRA | None, gate: Tensor) -> Tensor | None:
    return None if lora is None else cast(lora.B, adapter_dtype(gate, lora.B)).contiguous()


def _scale(lora: LoRA | None) -> float:
    return 0.0 if lora is None else lora.scale


def _rank(lora: LoRA | None) -> int:
    return 0 if lora is None else lora.A.shape[0]


def _block_r(loras: Loras) -> int:
    return block_r(max(1, *(_rank(lora) for lora in loras)))


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
