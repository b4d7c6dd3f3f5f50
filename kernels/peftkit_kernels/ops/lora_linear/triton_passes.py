"""The steps of linears with adapters by Triton kernels around the library's GEMMs.

A product with an update has two forms (``low_rank.config.fuses_gemm`` chooses). *addmm* writes the update first and lets the GEMM add
to it: the GEMM reads it back while its main loop runs, and only the small term is rounded before the sum. *fused* is one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import target_of
from peftkit_kernels.core.views import as_one_view
from peftkit_kernels.gemm import whole_rows
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes
from peftkit_kernels.low_rank.config import RANK_TILE, fuses_gemm
from peftkit_kernels.low_rank.groups import (
    Groups,
    add_updates,
    grads_of_a,
    group,
    members_of,
    rank_of,
    shrink_groups,
    stacked_factor,
)
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.fp8.product import passes as fp8
from peftkit_kernels.storage.fp8.product import torch_impl as fp8_products
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product import passes as int8
from peftkit_kernels.storage.product.passes import decodes_in_product, small_m
from peftkit_kernels.storage.quantized import (
    Weight,
    contains_update,
    dense_triton,
    stacked_triton,
)

Loras = Sequence[LoRA | None]


class TritonPasses:
    """The steps of ``ops.lora_linear.schedule``. Adapters with one mask share their passes (``low_rank.groups``).

    Attributes:
        sums: Sums of split results that are not yet computed. ``grads_at_output`` computes them.
    """

    def __init__(self) -> None:
        self.sums = passes.Sums()
        self._quantized: int8.Quantized | None = None
        """The input in 8 bits that was needed last."""
        self._float8: fp8_products.Quantized | None = None
        """The input in float8 that was needed last."""

    def shrinks(self, x: Tensor, weights: Sequence[Weight], loras: Loras) -> list[Tensor]:
        """``drop(x) Aᵀ``, ``[M, ΣR]`` for each group of adapters; ``s_of`` has those of each adapter."""
        groups = group(loras)
        if not groups or not isinstance(weights[0], Int8ComputeWeight):
            return shrink_groups(x, loras, groups)
        # the pass that quantises x computes the first of them
        A, p, seed = stacked_factor(x, loras, groups[0])
        if A.shape[0] > RANK_TILE:
            return shrink_groups(x, loras, groups)
        self._quantized = int8.quantize_input(x, weights[0].threshold, A, p=p, seed=seed)
        assert self._quantized.s is not None
        return [self._quantized.s, *shrink_groups(x, loras, groups[1:])]

    def s_of(self, joint: Sequence[Tensor], loras: Loras) -> list[Tensor | None]:
        """Each adapter's part of what ``shrinks`` has returned."""
        return members_of(joint, loras, group(loras), 1)

    def project(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        s: Tensor | None,
        lora: LoRA | None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """``x Wᵀ + bias + scale · s Bᵀ`` for rows ``x [M, K]`` and ``s [M, R]``, into ``out`` if given.

        There is no update if the weight contains it.
        """
        lora = None if contains_update(weight) else lora
        update: Any = () if lora is None or s is None else (s, cast(lora.B, s.dtype), lora.scale)
        if isinstance(weight, Int8ComputeWeight):
            return int8.linear(self._in_8_bits(x, weight), weight, *update, bias=bias, out=out)
        if isinstance(weight, Float8Weight):
            y = fp8_products.linear(self._in_float8(x), weight, bias)
            # torch._scaled_mm writes whole tensors only
            y = y if out is None else out.copy_(y)
            return passes.expand(*update, out=y, add=True) if update else y
        return project(x, weight, *update, bias=bias, out=out)

    def _in_8_bits(self, x: Tensor, weight: Int8ComputeWeight) -> int8.Quantized:
        """``x`` in 8 bits, computed once for linears of one input, which are multiplied one after the other."""
        known = self._quantized
        if known is None or known.x is not x or known.threshold != weight.threshold:
            known = self._quantized = int8.quantize_input(x, weight.threshold)
        return known

    def _in_float8(self, x: Tensor) -> fp8_products.Quantized:
        """``x`` in float8, computed once for linears of one input, which are multiplied one after the other."""
        if self._float8 is None or self._float8.x is not x:
            self._float8 = fp8.quantize_input(x)
        return self._float8

    def grads_at_output(
        self,
        dys: Sequence[Tensor | None],
        ss: Sequence[Tensor | None],
        loras: Loras,
        needs_B: Sequence[bool],
        needs_ds: bool,
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The dB's that are needed, and ``scale · dy B`` of each group, zero in the columns of an output without a gradient."""
        first = next(dy for dy in dys if dy is not None)
        ds = joint_like(first, first.shape[0], loras)
        for members, part in zip(group(loras), ds, strict=True):
            # no pass writes these columns, but the passes over the group read them
            if any(dys[i] is None for i in members):
                part.zero_()
        dB: list[Tensor | None] = [None] * len(loras)
        parts = zip(dys, ss, self.s_of(ds, loras), loras, strict=True)
        for i, (dy, s, out, lora) in enumerate(parts):
            if lora is None or dy is None:
                continue
            B, dtype = cast(lora.B, adapter_dtype(dy, lora.B)), lora.B.dtype
            # one pass over dy can compute both
            if needs_B[i] and needs_ds:
                dB[i], _ = passes.grad_b_and_s(dy, s, B, lora.scale, dtype, ds=out, sums=self.sums)
            elif needs_B[i]:
                dB[i] = passes.grad_b(dy, s, lora.scale, dtype, sums=self.sums)
            elif needs_ds:
                passes.grad_s(dy, B, lora.scale, out=out, sums=self.sums)
        self.sums.finish()
        return dB, ds

    def grad_x(
        self,
        dys: Sequence[Tensor | None],
        weights: Sequence[Weight],
        ds: Sequence[Tensor],
        loras: Loras,
    ) -> Tensor:
        """``Σ dy W + mask ∘ (ds A)``, ``[M, K]``; without the updates that the weights contain."""
        dtype = next(dy for dy in dys if dy is not None).dtype
        ds, loras, groups = _outside(ds, weights, loras)
        if len(weights) == 1 and dys[0] is not None:
            return self._grad_x_of_one(dys[0], weights[0], ds, loras[0])
        # the updates before the products: the GEMMs then add to dx in place
        dx = add_updates(None, ds, loras, groups, dtype)
        if any(_is_in_8_bits(weight) for weight in weights):
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None:
                    part = self._grad_x_of_one(dy, weight, [], None)
                    dx = part if dx is None else dx.add_(part)
        else:
            for dy, W in _products(dys, weights, dtype):
                dy = whole_rows(dy)
                dx = dy @ W if dx is None else dx.addmm_(dy, W)
        assert dx is not None, "some output has a gradient"
        return dx

    def _grad_x_of_one(
        self, dy: Tensor, weight: Weight, ds: Sequence[Tensor], lora: LoRA | None
    ) -> Tensor:
        """``dy W + mask ∘ (ds A)`` of one linear."""
        update, mask = (), {}
        if lora is not None:
            update, mask = (ds[0], cast(lora.A, ds[0].dtype).t()), {"p": lora.p, "seed": lora.seed}
        if isinstance(weight, Int8ComputeWeight) and weight.backward_in_8_bits:
            return int8.input_grad(dy, weight, *update, **mask)
        if isinstance(weight, Float8Weight):
            dx = fp8.input_grad(dy, weight)
            return passes.expand(*update, 1.0, **mask, out=dx, add=True) if update else dx
        return project(dy, dense_triton(weight, dy.dtype).t(), *update, **mask)

    def grads_of_a(
        self, x: Tensor, ds: Sequence[Tensor], loras: Loras, needs_A: Sequence[bool]
    ) -> list[Tensor | None]:
        """The dA's ``dsᵀ drop(x)`` that are needed. Those of a group are parts of one tensor."""
        groups = group(loras)
        dA = members_of(grads_of_a(x, ds, loras, groups), loras, groups, 0)
        return [grad if needed else None for grad, needed in zip(dA, needs_A, strict=True)]


def project(
    x: Tensor,
    weight: Weight,
    s: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + mask ∘ (scale · s Bᵀ) + bias`` in one of the forms; arguments as ``passes.gemm_lora``.

    The weight may have another dtype. If there is no mask, it may be quantised; it is decoded. Without ``s`` and ``B`` there is no
    update. ``out`` may have any row stride.
    """
    N, K = weight.shape
    bias = None if bias is None else cast(bias, x.dtype)
    fits_one_program = out is None and (s is None or s.shape[1] <= RANK_TILE)
    if (
        fits_one_program
        and not isinstance(weight, Tensor)
        and decodes_in_product(x.shape[0], weight, target_of(x))
    ):
        return small_m(x, weight, bias, s, B, scale)
    weight = dense_triton(weight, x.dtype)
    if s is None or B is None:
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(whole_rows(x), weight.t(), out=out)
        return torch.addmm(bias, whole_rows(x), weight.t(), out=out)
    if fits_one_program and fuses_gemm(N, K, itemsize=x.element_size(), target=target_of(x)):
        return passes.gemm_lora(x, weight, s, B, scale, bias=bias, p=p, seed=seed)
    # the update before the product: the GEMM reads it back while its main loop runs
    update = passes.expand(s, B, scale, bias=bias, p=p, seed=seed, out=out, dtype=x.dtype)
    return update.addmm_(whole_rows(x), weight.t())


def _outside(
    ds: Sequence[Tensor], weights: Sequence[Weight], loras: Loras
) -> tuple[Sequence[Tensor], Loras, Groups]:
    """``ds``, the adapters and their groups, without the adapters whose weights contain their updates."""
    groups = group(loras)
    if not any(map(contains_update, weights)):
        return ds, loras, groups
    parts = members_of(ds, loras, groups, 1)
    left = [
        None if contains_update(weight) else lora
        for weight, lora in zip(weights, loras, strict=True)
    ]
    alone = [[i] for i, lora in enumerate(left) if lora is not None]
    return [part for (i,) in alone if (part := parts[i]) is not None], left, alone


def _is_in_8_bits(weight: Weight) -> bool:
    if isinstance(weight, Int8ComputeWeight):
        return weight.backward_in_8_bits
    return isinstance(weight, Float8Weight)


def joint_like(x: Tensor, M: int, loras: Loras) -> list[Tensor]:
    """An uninitialised ``[M, ΣR]`` for ``drop(x) Aᵀ`` of every group of adapters."""
    return [
        x.new_empty(M, rank_of(loras, members), dtype=adapter_dtype(x, loras[members[0]].A))  # pyright: ignore[reportOptionalMemberAccess]
        for members in group(loras)
    ]


def _products(
    dys: Sequence[Tensor | None], weights: Sequence[Weight], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs ``(dy, W)`` whose products add up to dx: one pair if gradients and weights are each parts of one buffer.

    A decoded ``W`` is valid until the next pair is made.
    """
    present = [(dy, weight) for dy, weight in zip(dys, weights, strict=True) if dy is not None]
    left = as_one_view([dy for dy, _ in present], 1)
    right = None if left is None else stacked_triton([weight for _, weight in present], dtype)
    if left is not None and right is not None:
        yield left, right
        return
    for dy, weight in present:
        yield dy, dense_triton(weight, dtype)
