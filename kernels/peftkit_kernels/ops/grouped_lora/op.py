"""The public function: checks, choice of backend."""

from __future__ import annotations

from torch import Tensor

from peftkit_kernels.core.dispatch import Backend, choose_backend, is_transformed
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.ops.grouped_lora import schedule
from peftkit_kernels.ops.grouped_lora.config import obstacle
from peftkit_kernels.ops.grouped_lora.passes import table_of
from peftkit_kernels.ops.grouped_lora.plan import GroupPlan
from peftkit_kernels.ops.grouped_lora.reference import grouped_lora_reference
from peftkit_kernels.ops.grouped_lora.torch_passes import tiles_of


def grouped_lora(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    plan: GroupPlan,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Add to each row the update of its adapter: ``y[m] + scale[e] · B[e] A[e] x[m]`` with ``e = plan.ids[m]``.

    Rows without an adapter are returned unchanged. A NaN in another row or in another adapter never changes a row.
    Kept for backward: ``x`` if A is trained, and ``s = A[e] x[m]`` if B is trained.

    Args:
        y: ``[..., N]``, the output of the frozen linear, in the dtype of ``x``.
        x: ``[..., K]``.
        A: ``[E, R, K]``; adapters of lower rank are padded with zeros, in A and in B.
        B: ``[E, N, R]``, the dtype of ``A``. Adapters are computed in ``low_rank.adapter_dtype``: in float32 for float32
            factors on a 16-bit ``x``.
        scale: ``Float[E]``; it has no gradient.
        plan: From ``plan_groups``, for the rows of ``x`` in their flattened order.
        backend: ``"auto"``, ``"triton"`` (tiles of up to 64 rows; in float32 ranks up to 16), ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]``, a new tensor.

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run.

    Source: Chen et al., 2023, arXiv:2310.18547 (many adapters in one batch).
    """
    if backend == "auto" and replays(x):
        call = schedule.Grouped(x, y, A, B, scale, table_of(plan))
        out = schedule.grouped_lora.again(call)
        if out is not None:
            return out
    _check(y, x, A, B, scale, plan)
    rank = A.shape[1]
    chosen = choose_backend("grouped_lora", backend, x, y, A, B, scale, plan.ids, rank=rank)
    reason = obstacle(plan.block, rank, itemsize=x.element_size()) if chosen == "triton" else None
    if reason is not None:
        if backend == "triton":
            raise ValueError(f"backend='triton': {reason}")
        chosen = "reference" if is_transformed() else "torch"
    # without rows the plan has no tiles
    empty = plan.ids.numel() == 0
    if chosen == "reference" or empty:
        return grouped_lora_reference(y, x, A, B, scale, plan.ids)
    table = table_of(plan) if chosen == "triton" else tiles_of(plan)
    return schedule.grouped_lora(chosen, schedule.Grouped(x, y, A, B, scale, table))


def _check(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, plan: GroupPlan) -> None:
    E = plan.adapters
    if A.dim() != 3 or B.dim() != 3 or A.shape[0] != E or B.shape[::2] != A.shape[:2]:
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a plan for {E} adapters; they must be [{E}, R, K] and "
            f"[{E}, N, R]"
        )
    if A.dtype != B.dtype:
        raise ValueError(f"A is {A.dtype} and B is {B.dtype}; keep both factors in one dtype")
    if x.shape[-1:] != A.shape[2:] or y.shape != (*x.shape[:-1], B.shape[1]):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit A {tuple(A.shape)} and B {tuple(B.shape)}; they must be "
            f"[..., {A.shape[2]}] and [..., {B.shape[1]}]"
        )
    if y.dtype != x.dtype:
        raise ValueError(f"y is {y.dtype} and x is {x.dtype}; they must have the same dtype")
    if scale.shape != (E,) or scale.requires_grad:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)} and requires_grad={scale.requires_grad}; it must be [{E}] and frozen"
        )
    if x.numel() // max(1, x.shape[-1]) != plan.ids.numel():
        raise ValueError(
            f"x {tuple(x.shape)} does not have the {plan.ids.numel()} rows that the plan was made for; make a new plan"
        )
