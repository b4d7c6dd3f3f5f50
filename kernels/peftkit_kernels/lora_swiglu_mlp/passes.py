"""The two passes over ``[M, F]`` that are the gate's own: allocate, choose a configuration, launch.

Rows are of one dtype (bfloat16, float16, float32) on one device, M > 0; s and ds have ``adapter_dtype``. ``loras`` are those of gate, up and down, ``None`` where
there is none; ``s`` and ``ds`` are their ``[M, R]``. ``config`` overrides the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.dropout import keep_scale, threshold
from peftkit_kernels.launch import aligned, cdiv, dot_precision, launch, step_of, target_of
from peftkit_kernels.lora_swiglu_mlp.config import GateBackwardConfig, GateConfig
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.low_rank.passes import sum_partials

Loras = Sequence[LoRA | None]


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.lora_swiglu_mlp import kernels

    return kernels


def gate_forward(
    e: Tensor,
    g: Tensor,
    s: Sequence[Tensor | None],
    loras: Loras,
    act: str,
    *,
    config: GateConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``h = act(e + c s Bᵀ) ∘ (g + c s Bᵀ)``, ``[M, F]``, and ``drop(h) Aᵀ`` of the down projection, ``[M, R]``.

    Args:
        e: ``x Wᵀ + bias`` of the gate projection, without its update.
        g: The same of the up projection.
        s: Of gate and up.
        loras: Three; without one for the down projection there is no second result.
        act: One of ``ACTIVATIONS``.
        config: Tiles.
    """
    (M, F), (gate, up, down) = e.shape, loras
    p, seed = (down.p, down.seed) if down else (0.0, 0)
    b_e, b_g, a_d = _b(gate, e), _b(up, e), _a(down, e)
    c = config or GateConfig.choose(
        *(M, F, _block_r(loras)),
        aligned=aligned(e, g),
        target=target_of(e),
        mixed=_is_mixed(e, b_e, b_g, a_d),
    )
    h = e.new_empty(M, F)
    blocks = cdiv(F, c.block_f)
    steps = cdiv(blocks, c.splits)
    splits = cdiv(blocks, steps)
    s_d = partial = None
    if a_d is not None:
        s_d = a_d.new_empty(M, a_d.shape[0])
        partial = s_d if splits == 1 else e.new_empty(splits, *s_d.shape, dtype=torch.float32)
    launch(
        _kernels().gate_forward_kernel,
        (cdiv(M, c.block_m), splits),
        *(e, g, h, s[0], b_e, s[1], b_g, a_d, partial),
        *(_scale(gate), _scale(up), keep_scale(p), seed, threshold(p)),
        *(M, F, *(_rank(lora) for lora in loras), steps),
        *(e.stride(0), g.stride(0), h.stride(0), *(_row_stride(t) for t in s)),
        HAS_E=gate is not None,
        HAS_G=up is not None,
        HAS_D=down is not None,
        DROPOUT=p > 0,
        ACT=act,
        STEP=step_of(*(_rank(lora) for lora in loras), *(_row_stride(t) for t in s)),
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_f,
        BLOCK_R=_block_r(loras),
        PRECISION=dot_precision(e.dtype, b_e, b_g, a_d),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if s_d is not None and partial is not None and splits > 1:
        sum_partials(partial, s_d)
    return h, s_d


def gate_backward(
    dh: Tensor,
    e: Tensor,
    g: Tensor,
    s: Sequence[Tensor | None],
    ds: Tensor | None,
    loras: Loras,
    act: str,
    *,
    needs_dA: bool,
    config: GateBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``de`` and ``dg`` (the halves of one ``[M, 2F]``), and dA of the down projection if ``needs_dA``.

    Args:
        dh: ``dy W`` of the down projection, without its update's part.
        e: As in ``gate_forward``, and so are ``g``, ``s`` and ``act``; ``h`` is made again from them and not stored.
        g: See ``e``.
        s: See ``e``.
        ds: ``scale · dy B`` of the down projection.
        loras: Three.
        act: See ``e``.
        needs_dA: Whether dA is wanted.
        config: Tiles.
    """
    (M, F), (gate, up, down) = e.shape, loras
    p, seed = (down.p, down.seed) if down else (0.0, 0)
    b_e, b_g, a_d = _b(gate, e), _b(up, e), _a(down, e)
    c = config or GateBackwardConfig.choose(
        *(M, F, _block_r(loras)),
        itemsize=e.element_size(),
        aligned=aligned(e, g),
        target=target_of(e),
        mixed=_is_mixed(e, b_e, b_g, a_d),
    )
    de, dg = e.new_empty(M, 2 * F).split(F, 1)
    chunks = cdiv(M, c.chunk_m)
    dA = partial = None
    if needs_dA and down is not None:
        dA = down.A.new_empty(down.A.shape)
        partial = dA if chunks == 1 else e.new_empty(chunks, *dA.shape, dtype=torch.float32)
    launch(
        _kernels().gate_backward_kernel,
        (chunks, cdiv(F, c.block_f)),
        *(e, g, dh, de, dg, s[0], b_e, s[1], b_g),
        *(ds, a_d, partial),
        *(_scale(gate), _scale(up), keep_scale(p), seed, threshold(p)),
        *(M, F, *(_rank(lora) for lora in loras), c.chunk_m),
        *(e.stride(0), g.stride(0), dh.stride(0), de.stride(0)),
        *(_row_stride(t) for t in (*s, ds)),
        *((0, 0) if partial is None else (0 if chunks == 1 else partial.stride(0), F)),
        HAS_E=gate is not None,
        HAS_G=up is not None,
        HAS_D=down is not None,
        WITH_DA=partial is not None,
        DROPOUT=p > 0,
        ACT=act,
        STEP=step_of(*(_rank(lora) for lora in loras), *(_row_stride(t) for t in (*s, ds))),
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_f,
        BLOCK_R=_block_r(loras),
        PRECISION=dot_precision(e.dtype, b_e, b_g, a_d),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if dA is not None and partial is not None and chunks > 1:
        sum_partials(partial, dA)
    return de, dg, dA


def _is_mixed(e: Tensor, *factors: Tensor | None) -> bool:
    return any(factor is not None and factor.dtype is not e.dtype for factor in factors)


def _a(lora: LoRA | None, e: Tensor) -> Tensor | None:
    return None if lora is None else cast(lora.A, adapter_dtype(e, lora.A)).contiguous()


def _b(lora: LoRA | None, e: Tensor) -> Tensor | None:
    return None if lora is None else cast(lora.B, adapter_dtype(e, lora.B)).contiguous()


def _scale(lora: LoRA | None) -> float:
    return 0.0 if lora is None else lora.scale


def _rank(lora: LoRA | None) -> int:
    return 0 if lora is None else lora.A.shape[0]


def _block_r(loras: Loras) -> int:
    return block_r(max(1, *(_rank(lora) for lora in loras)))


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
