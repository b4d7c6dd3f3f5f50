"""The steps of a bottleneck adapter by Triton kernels: one of its own in each direction, and the tall passes of ``low_rank``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, target_of
from peftkit_kernels.low_rank import cast, passes, rows
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.low_rank.passes import readable
from peftkit_kernels.ops.bottleneck.config import BottleneckConfig


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.bottleneck import kernels

    return kernels


class TritonPasses:
    """The steps of ``ops.bottleneck.schedule``."""

    def rows(self, t: Tensor) -> Tensor:
        """``t`` as rows ``[M, D]``, in a layout that the kernels can read."""
        return readable(rows(t))

    def adapt(
        self,
        h: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        base: Tensor | None,
        scale: float,
        act: str,
    ) -> tuple[Tensor, Tensor]:
        """``y`` for rows ``h [M, D]``, and ``z = h downᵀ + down_bias``, ``[M, R]``: one kernel."""
        y, z = h.new_empty(h.shape), h.new_empty(h.shape[0], down.shape[0])
        dtype, (R, D), c = h.dtype, down.shape, _choose(h, down.shape[0])
        down, up = cast(down, dtype), cast(up, dtype)
        down_bias, up_bias = (None if b is None else readable(b) for b in (down_bias, up_bias))
        launch(
            _kernels().bottleneck_forward_kernel,
            (cdiv(h.shape[0], c.block_m),),
            *(h, down, down_bias, up, up_bias, base, y, z, scale, h.shape[0], D, R),
            *(h.stride(0), *down.stride(), *up.stride()),
            *(0 if base is None else base.stride(0), y.stride(0)),
            HAS_BASE=base is not None,
            HAS_DOWN_BIAS=down_bias is not None,
            HAS_UP_BIAS=up_bias is not None,
            **_constants(c, R, act, dtype),
        )
        return y, z

    def grads_inside(
        self,
        dy: Tensor,
        z: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        act: str,
        *,
        has_base: bool,
        needs_a: bool,
        needs_dz: bool,
        needs_dh: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of ``a = act(z)``, ``dz`` and ``dh`` that are needed: one kernel."""
        a = torch.empty_like(z) if needs_a else None
        dz = torch.empty_like(z) if needs_dz else None
        dh = dy.new_empty(dy.shape) if needs_dh else None
        (M, D), R = dy.shape, z.shape[1]
        c = _choose(dy, R)
        down, up = cast(down, dy.dtype), cast(up, dy.dtype)
        launch(
            _kernels().bottleneck_backward_kernel,
            (cdiv(M, c.block_m),),
            *(dy, z, down, up, a, dz, dh, scale, M, D, R, dy.stride(0)),
            *(*down.stride(), *up.stride(), 0 if dh is None else dh.stride(0)),
            HAS_BASE=has_base,
            WITH_A=a is not None,
            WITH_DZ=dz is not None,
            WITH_DH=dh is not None,
            **_constants(c, R, act, dy.dtype),
        )
        return a, dz, dh

    def grad_down(self, dz: Tensor, h: Tensor, down: Tensor) -> Tensor:
        """``dzᵀ h`` in the dtype of ``down``."""
        return passes.grad_a(dz, h, down.dtype)

    def grad_up(self, dy: Tensor, a: Tensor, scale: float, up: Tensor) -> Tensor:
        """``scale · dyᵀ a`` in the dtype of ``up``."""
        return passes.grad_b(dy, a, scale, up.dtype)

    def sum_of_rows(self, grad: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
        """``scale · Σ grad`` in ``dtype``, summed in float32."""
        total = grad.sum(0, dtype=torch.float32)
        return cast(total if scale is None else total.mul_(scale), dtype)


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
