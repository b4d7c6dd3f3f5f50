"""The steps of linears with adapters by torch operations: the BLAS computes the large products, rank-r passes add the updates.

A quantised weight is decoded into the workspace before each product, unless its kind is multiplied as it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.gemm import addmm_nn, matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.fp8.product import torch_impl as fp8
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product import torch_impl as int8
from peftkit_kernels.storage.quantized import Weight, contains_update, dense

Loras = Sequence[LoRA | None]


class Joint(NamedTuple):
    """The gradients of s of adapters that share their products, side by side."""

    members: list[int]
    ds: Tensor


class TorchPasses:
    """The steps of ``ops.lora_linear.schedule``. Adapters without dropout share their products."""

    def __init__(self) -> None:
        self._quantized: int8.Quantized | None = None
        """The input in 8 bits that was needed last."""
        self._float8: fp8.Quantized | None = None
        """The input in float8 that was needed last."""

    def shrinks(self, x: Tensor, weights: Sequence[Weight], loras: Loras) -> list[Tensor]:
        """``drop(x) Aᵀ``, ``[M, ΣR]`` for each group of adapters; ``s_of`` has those of each adapter."""
        found = []
        for members in _groups(x.shape[0], loras):
            first = _lora(loras, members[0])
            found.append(low_rank.shrink(x, _stacked(loras, members), first.p, first.seed))
        return found

    def s_of(self, joint: Sequence[Tensor], loras: Loras) -> list[Tensor | None]:
        """Each adapter's part of what ``shrinks`` has returned."""
        parts: list[Tensor | None] = [None] * len(loras)
        rows = joint[0].shape[0] if joint else 0
        for tensor, members in zip(joint, _groups(rows, loras), strict=True):
            sizes = [_lora(loras, i).A.shape[0] for i in members]
            for i, part in zip(members, tensor.split(sizes, 1), strict=True):
                parts[i] = part
        return parts

    def project(
        self, x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, lora: LoRA | None
    ) -> Tensor:
        """``x Wᵀ + bias + scale · s Bᵀ`` for rows ``x [M, K]`` and ``s [M, R]``; no update if the weight contains it."""
        if contains_update(weight):
            return project(x, weight, bias, None, None)
        if isinstance(weight, Float8Weight):
            y = fp8.linear(self._in_float8(x), weight, bias)
            return y if lora is None or s is None else low_rank.expand_(y, s, lora.B, lora.scale)
        if not isinstance(weight, Int8ComputeWeight):
            return project(x, weight, bias, s, lora)
        t = None
        if lora is not None and s is not None:
            t = cast(lora.B, torch.promote_types(s.dtype, torch.float32)).t() * lora.scale
        return int8.linear(self._in_8_bits(x, weight), weight, bias, s, t)

    def _in_8_bits(self, x: Tensor, weight: Int8ComputeWeight) -> int8.Quantized:
        """``x`` in 8 bits, computed once for linears of one input, which are multiplied one after the other."""
        known = self._quantized
        if known is None or known.x is not x or known.threshold != weight.threshold:
            known = self._quantized = int8.quantize_input(x, weight.threshold)
        return known

    def _in_float8(self, x: Tensor) -> fp8.Quantized:
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
    ) -> tuple[list[Tensor | None], list[Joint]]:
        """The dB's that are needed, and ``scale · dy B`` of all adapters whose output has a gradient."""
        dB: list[Tensor | None] = [None] * len(loras)
        ds: dict[int, Tensor] = {}
        for i, (dy, s, lora) in enumerate(zip(dys, ss, loras, strict=True)):
            if dy is None or lora is None:
                continue
            if needs_ds:
                ds[i] = low_rank.grad_s(dy, lora.B, lora.scale)
            if needs_B[i] and s is not None:
                dB[i] = low_rank.grad_b(dy, s, lora.scale, lora.B)
        shared = [i for i in ds if _lora(loras, i).p == 0.0]
        # an adapter with dropout has its own mask, and therefore its own products
        groups = [shared] if shared else []
        groups += [[i] for i in ds if i not in shared]
        return dB, [Joint(members, _side_by_side([ds[i] for i in members])) for members in groups]

    def grad_x(
        self,
        dys: Sequence[Tensor | None],
        weights: Sequence[Weight],
        ds: Sequence[Joint],
        loras: Loras,
    ) -> Tensor:
        """``Σ dy W + mask ∘ (ds A)``, ``[M, K]``; without the updates that the weights contain."""
        dx, ds = None, _outside(ds, weights, loras)
        for dy, weight in zip(dys, weights, strict=True):
            if dy is None:
                continue
            if isinstance(weight, Int8ComputeWeight) and weight.backward_in_8_bits:
                update = None, None
                if len(weights) == 1 and len(ds) == 1 and _lora(loras, 0).p == 0.0:
                    # one adapter, whose update the pass that scales the product also adds
                    update, ds = (ds[0].ds, _lora(loras, 0).A), []
                dx = int8.input_grad(dy, weight, *update, dx)
            elif isinstance(weight, Float8Weight):
                part = fp8.input_grad(dy, weight)
                dx = part if dx is None else dx.add_(part)
            else:
                W = dense(weight, dy.dtype)
                dx = matmul_nn(dy, W) if dx is None else addmm_nn(dx, dy, W)
        assert dx is not None, "some output has a gradient"
        for joint in ds:
            first, A = _lora(loras, joint.members[0]), _stacked(loras, joint.members)
            dx = low_rank.expand_grad_(dx, joint.ds, A, first.p, first.seed)
        return dx

    def grads_of_a(
        self, x: Tensor, ds: Sequence[Joint], loras: Loras, needs_A: Sequence[bool]
    ) -> list[Tensor | None]:
        """The dA's ``dsᵀ drop(x)`` that are needed."""
        dA: list[Tensor | None] = [None] * len(loras)
        for members, joint in ds:
            if not any(needs_A[i] for i in members):
                continue
            adapters = [_lora(loras, i) for i in members]
            first = adapters[0]
            dtype = first.A.dtype if len(members) == 1 else joint.dtype
            grads = low_rank.grad_a(joint, x, dtype, first.p, first.seed)
            parts = grads.split([lora.A.shape[0] for lora in adapters])
            for i, lora, part in zip(members, adapters, parts, strict=True):
                dA[i] = cast(part, lora.A.dtype) if needs_A[i] else None
        return dA


def project(
    x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, lora: LoRA | None
) -> Tensor:
    """``TorchPasses.project`` with a weight that is multiplied as it is, or decoded first."""
    y = matmul_nt(x, dense(weight, x.dtype), None if bias is None else cast(bias, x.dtype))
    return y if lora is None or s is None else low_rank.expand_(y, s, lora.B, lora.scale)


def joins_shrinks(rows: int, ranks: Sequence[int]) -> bool:
    """Whether adapters of these ranks share one product with their concatenated A's.

    They do if this moves fewer bytes: it reads ``x [rows, K]`` once instead of n times, but copies the A's.
    """
    return (len(ranks) - 1) * rows > 2 * sum(ranks)


def _groups(rows: int, loras: Loras) -> list[list[int]]:
    """The adapters whose shrinks are one product."""
    present = [i for i, lora in enumerate(loras) if lora is not None]
    shared = [i for i in present if _lora(loras, i).p == 0.0]
    if not joins_shrinks(rows, [_lora(loras, i).A.shape[0] for i in shared]):
        shared = []
    return ([shared] if shared else []) + [[i] for i in present if i not in shared]


def _outside(ds: Sequence[Joint], weights: Sequence[Weight], loras: Loras) -> Sequence[Joint]:
    """``ds`` without the adapters whose weights contain their updates."""
    if not any(map(contains_update, weights)):
        return ds
    left = []
    for members, joint in ds:
        parts = joint.split([_lora(loras, i).A.shape[0] for i in members], 1)
        rest = [i for i in members if not contains_update(weights[i])]
        if rest:
            kept = [part for i, part in zip(members, parts, strict=True) if i in rest]
            left.append(Joint(rest, _side_by_side(kept)))
    return left


def _stacked(loras: Loras, members: Sequence[int]) -> Tensor:
    factors = [_lora(loras, i).A for i in members]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _lora(loras: Loras, i: int) -> LoRA:
    lora = loras[i]
    assert lora is not None
    return lora
