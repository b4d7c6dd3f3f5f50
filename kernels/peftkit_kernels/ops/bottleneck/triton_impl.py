"""``bottleneck`` by Triton kernels, as torch.library ops: traceable, and differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, target_of
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import cast, passes, rows
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.low_rank.passes import readable
from peftkit_kernels.ops.bottleneck.config import BottleneckConfig
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.bottleneck import kernels

    return kernels


def forward(
    h: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    base: Tensor | None,
    scale: float,
    act: str,
    *,
    config: BottleneckConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``y`` as ``bottleneck`` defines it, and ``z``, the input of its activation, ``[M, R]``."""
    y, z = _like_outputs(h, down)
    if not h.numel():
        return y, z
    flat, flat_y, dtype, R = readable(rows(h)), rows(y), h.dtype, down.shape[0]
    flat_base = None if base is None else readable(rows(base))
    M, D = flat.shape
    c = config or _choose(flat, R)
    down, up = cast(down, dtype), cast(up, dtype)
    down_bias, up_bias = (None if b is None else readable(b) for b in (down_bias, up_bias))
    launch(
        _kernels().bottleneck_forward_kernel,
        (cdiv(M, c.block_m),),
        *(flat, down, down_bias, up, up_bias, flat_base, flat_y, z, scale, M, D, R),
        *(flat.stride(0), *down.stride(), *up.stride()),
        *(0 if flat_base is None else flat_base.stride(0), flat_y.stride(0)),
        HAS_BASE=base is not None,
        HAS_DOWN_BIAS=down_bias is not None,
        HAS_UP_BIAS=up_bias is not None,
        **_constants(c, R, act, dtype),
    )
    return y, z


def _like_outputs(h: Tensor, down: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[:-1].numel(), down.shape[0])


def backward(
    dy: Tensor,
    h: Tensor | None,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    act: str,
    has_base: bool,
    needs: Sequence[bool],
    *,
    config: BottleneckConfig | None = None,
) -> list[Tensor]:
    """Those of ``dh``, ``ddown``, ``ddown_bias`` (float32) and ``dup`` that ``needs`` selects; ``ddown`` needs ``h``.

    The gradient of a separate base is ``dy``. Without a separate base ``dy`` is added to ``dh``.
    """
    if not dy.numel():
        grads = _like_grads(dy, h, z, down, up, scale, act, has_base, needs)
        return [grad.zero_() for grad in grads]
    needs_h, needs_down, needs_bias, needs_up = needs
    flat, dtype = readable(rows(dy)), dy.dtype
    dh = ddown = ddown_bias = dup = a = dz = None
    if any(needs[:3]):
        dh = dy.new_empty(dy.shape) if needs_h else None
        a = torch.empty_like(z) if needs_up else None
        dz = torch.empty_like(z) if needs_down or needs_bias else None
        factors = cast(down, dtype), cast(up, dtype)
        _launch_backward(flat, z, *factors, a, dz, dh, scale, act, has_base, config)
    elif needs_up:
        # only dup is needed: no kernel has to read dy for a
        a = ACTIVATIONS[act](z)
    if needs_down:
        ddown = passes.grad_a(dz, rows(h), down.dtype)
    if needs_bias and dz is not None:
        ddown_bias = dz.sum(0, dtype=torch.float32)
    if needs_up:
        dup = passes.grad_b(flat, a, scale, up.dtype)
    return [grad for grad in (dh, ddown, ddown_bias, dup) if grad is not None]


def _launch_backward(
    dy: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    a: Tensor | None,
    dz: Tensor | None,
    dh: Tensor | None,
    scale: float,
    act: str,
    has_base: bool,
    config: BottleneckConfig | None,
) -> None:
    """Fill those of ``a``, ``dz`` and ``dh`` that are not ``None``."""
    (M, D), R, flat_dh = dy.shape, z.shape[1], None if dh is None else rows(dh)
    c = config or _choose(dy, R)
    launch(
        _kernels().bottleneck_backward_kernel,
        (cdiv(M, c.block_m),),
        *(dy, z, down, up, a, dz, flat_dh, scale, M, D, R, dy.stride(0)),
        *(*down.stride(), *up.stride(), 0 if flat_dh is None else flat_dh.stride(0)),
        HAS_BASE=has_base,
        WITH_A=a is not None,
        WITH_DZ=dz is not None,
        WITH_DH=dh is not None,
        **_constants(c, R, act, dy.dtype),
    )


def _choose(x: Tensor, R: int) -> BottleneckConfig:
    return BottleneckConfig.choose(
        x.shape[0], R, itemsize=x.element_size(), aligned=aligned(x), target=target_of(x)
    )


def _constants(c: BottleneckConfig, R: int, act: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "ACT": act,
        "BLOCK_M": c.block_m,
        "BLOCK_D": c.block_d,
        "BLOCK_R": block_r(R),
        "PRECISION": dot_precision(dtype),
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }


def _like_grads(
    dy: Tensor,
    h: Tensor | None,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    act: str,
    has_base: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    bias = dy.new_empty(down.shape[0], dtype=torch.float32)
    grads = dy.new_empty(dy.shape), down.new_empty(down.shape), bias, up.new_empty(up.shape)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    h, down, down_bias, up, up_bias, base, *ctx.numbers = inputs
    z = output[1]
    ctx.recompute_h, h_parts = recompute.saved_for(h, down.requires_grad)
    trained = [t for t in (h, down, down_bias, up) if t is not None and t.requires_grad]
    ctx.save_for_backward(z if trained else None, down, up, *h_parts)
    ctx.dtypes = tuple(None if b is None else b.dtype for b in (down_bias, up_bias))
    ctx.has_base = base is not None


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    z, down, up, *h_parts = ctx.saved_tensors
    scale, act = ctx.numbers
    *wanted, needs_up_bias, needs_base = needs
    dup_bias = None
    if needs_up_bias:
        dup_bias = cast(rows(dy).sum(0, dtype=torch.float32).mul_(scale), ctx.dtypes[1])
    grads: list[Tensor] = []
    if any(wanted):
        h = recompute.restore(ctx.recompute_h, h_parts)
        grads = list(_backward_op(dy, h, z, down, up, scale, act, ctx.has_base, wanted))
    dh, ddown, ddown_bias, dup = (grads.pop(0) if needed else None for needed in wanted)
    if ddown_bias is not None:
        ddown_bias = cast(ddown_bias, ctx.dtypes[0])
    return dh, ddown, ddown_bias, dup, dup_bias, dy if needs_base else None


_forward_op = Op(
    "bottleneck",
    "(Tensor h, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? base, float scale,"
    " str act)"
    " -> (Tensor, Tensor)",
    forward,
    _like_outputs,
)
bottleneck_triton = Differentiable(
    _forward_op, ("h", "down", "down_bias", "up", "up_bias", "base"), _keep, _backward
)
_backward_op = Op(
    "bottleneck_backward",
    "(Tensor dy, Tensor? h, Tensor z, Tensor down, Tensor up, float scale, str act, bool has_base,"
    " bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)
