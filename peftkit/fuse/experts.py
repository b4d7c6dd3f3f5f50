"""LoRA on parameters instead of modules: stacked expert weights and weights of linears, without computing ``W + B A``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peftkit.errors import ContractError
from peftkit.find.stacks import MERGE_DENSE, packed_stack, packed_stacks
from peftkit.fuse.adapter import (
    Adapter,
    changed_reason,
    current_adapter,
    has_foreign_hooks,
    has_hooks,
    weight_reason,
)
from peftkit.fuse.compute import LinearParts, backend_of, linear
from peftkit.fuse.linear import input_reason
from peftkit.fuse.packed import packed_product, packed_reason
from peftkit.fuse.plan import Fused, NotReached, Reason
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.core.checks import autocast_dtype, is_autocast_enabled, without_autocast
from peftkit_kernels.core.dispatch import choose_backend, is_transformed
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast
from peftkit_kernels.ops.grouped_lora import grouped_lora, plan_groups

_TRANSFORMED = Reason("under torch.compile and torch.func the experts run their own operations")


class FusedParamWrapper(Fused):
    """PEFT's ``ParamWrapper`` whose forward adds the low-rank products to the outputs instead of the weights.

    PEFT wraps a module once for each adapted parameter. The outermost wrapper computes the updates of all of them.
    """

    peftkit_method = "LoRA"

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, fused if ``peftkit_plan`` says so.

        Args:
            x: ``[..., in_features]``; for experts ``[tokens, hidden_size]``.
            args: For experts the chosen experts of every token and their weights, ``[tokens, choices]`` each.
            kwargs: As for PEFT's own forward, which runs if there are any.
        """
        experts = self.get_base_layer()
        if kwargs or len(args) != (0 if type(experts) is nn.Linear else 2):
            _require_fused(self, Reason("it was called with further arguments"))
            return super().forward(x, *args, **kwargs)
        if packed_stacks(experts) and autocast_dtype(x) not in (None, x.dtype):
            return in_autocast_dtype(self.forward, x, *args)
        plan = self.peftkit_plan(x)
        if isinstance(plan, Reason):
            _require_fused(self, plan)
            return super().forward(x, *args)
        return linear(x, plan) if isinstance(plan, LinearParts) else routed(experts, plan, x, *args)

    def peftkit_plan(self: Any, x: Tensor) -> LinearParts | dict[str, Update] | Reason:
        """A linear's parts, the update of each adapted stack of experts by name, or the reason why PEFT's forward runs."""
        base = self.get_base_layer()
        if type(base) is nn.Linear:
            return self._linear_plan(base, x)
        reason = experts_reason(base, x)
        if reason is not None:
            return reason
        updates = {}
        for wrapper in _chain(self):
            if wrapper is not self and has_hooks(wrapper):
                return Reason(f"the adapter of {wrapper.parameter_name} has hooks")
            found = _adapter_of(wrapper)
            if isinstance(found, Reason):
                return found
            updates[wrapper.parameter_name] = _update(wrapper, found, x.device)
        return updates

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge, which cannot write into a stack in four bits.

        Raises:
            ContractError: The stack is stored in four bits.
        """
        name = self.parameter_name
        if packed_stack(self.get_base_layer(), name) is not None:
            raise ContractError(
                f"{name} is stored in 4 bits, and PEFT's merge would change a decoded copy that is thrown away. {MERGE_DENSE}"
            )
        stock: Any = super()
        stock.merge(*args, **kwargs)

    def peftkit_example(self: Any) -> Tensor:
        """One row of input with the dtype and device of the weights."""
        packed = packed_stack(self.get_base_layer(), self.parameter_name)
        if packed is not None:
            return packed.packed.new_empty(1, self.in_features, dtype=packed.state.dtype)
        parameter = self.get_param()
        return parameter.new_empty(1, self.in_features)

    def peftkit_backend(self: Any, x: Tensor, plan: Any) -> str:
        """``"torch"`` or ``"triton"``."""
        if isinstance(plan, LinearParts):
            return backend_of(x, plan)
        rank = max(update.A.shape[1] for update in plan.values())
        return choose_backend("grouped_lora", "auto", x, rank=rank)

    def _linear_plan(self: Any, base: nn.Module, x: Tensor) -> LinearParts | Reason:
        found = _adapter_of(self)
        if isinstance(found, Reason):
            return found
        reason = weight_reason(base) or input_reason(x, base._parameters["weight"])
        if reason is not None:
            return reason
        A, B = found.A.weight, found.B.weight
        if A.dtype is not B.dtype:
            return Reason(f"its factors are {A.dtype} and {B.dtype}")
        return LinearParts(base.weight, base.bias, LoRA(A, B, self.scaling[found.name]))


def in_autocast_dtype(forward: Callable[..., Tensor], x: Tensor, *args: Tensor) -> Tensor:
    """Call ``forward`` on ``x`` in the dtype of autocast, without autocast. The result has the dtype of ``x``."""
    dtype = autocast_dtype(x)
    with without_autocast(x):
        return forward(x.to(dtype), *args).to(x.dtype)


def _require_fused(wrapper: Any, reason: Reason) -> None:
    """Raise an error if PEFT's forward would leave an adapter out.

    PEFT reads each stack while the decoded stacks are cached, so that of two adapted stacks one is used without its adapter.

    Raises:
        ContractError: The experts have stacks in four bits, and an adapter is active.
    """
    experts = wrapper.get_base_layer()
    plain = isinstance(reason, NotReached) or wrapper.disable_adapters
    if plain or not packed_stacks(experts):
        return
    raise ContractError(
        f"the experts ({type(experts).__name__}) are stored in 4 bits and cannot be fused: {reason}. PEFT's forward would ignore one of "
        "their adapters. Remove the cause, or keep the experts unquantised: load_base(..., keep=['experts'])"
    )


def _chain(wrapper: Any) -> Iterator[Any]:
    """A wrapper and the wrappers inside it."""
    while isinstance(wrapper, ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _adapter_of(wrapper: Any) -> Adapter | Reason:
    """The adapter of one wrapper, or the reason why PEFT's own forward runs."""
    found = current_adapter(wrapper, wrapper.get_base_layer())
    if isinstance(found, Reason):
        return found
    return changed_reason(wrapper, found) or found


def experts_reason(experts: Any, x: Tensor) -> Reason | None:
    """Why ``routed`` cannot replace the forward of these experts on ``x``, or ``None``."""
    if is_transformed():
        return _TRANSFORMED
    if getattr(experts, "_is_expert_parallel", False):
        return Reason("the experts are distributed over processes")
    packed = packed_stacks(experts)
    if has_foreign_hooks(experts):
        return Reason("its experts have hooks")
    name = experts.config._experts_implementation
    if name not in (None, "eager"):
        function = ALL_EXPERTS_FUNCTIONS.get(name)
        if getattr(function, "__module__", "").partition(".")[0] != "transformers":
            return Reason(
                f"its experts use {name!r}, which is not an implementation of transformers"
            )
    # If an outer wrapper runs PEFT's forward, it has replaced its stack by the sum W + B A, which needs a gradient.
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        if name in packed:
            reason = packed_reason(name, packed[name], x)
        else:
            reason = _stack_reason(x, name, experts._parameters.get(name))
        if reason is not None:
            return reason
    return _device_reason(x)


def _stack_reason(x: Tensor, name: str, weight: Tensor | None) -> Reason | None:
    """Why rows of ``x`` cannot be multiplied by a stack of weights."""
    if type(weight) is not nn.Parameter:
        return Reason(f"{name} is computed in each forward, not a parameter")
    if weight.requires_grad:
        return Reason(f"{name} is trained")
    if weight.device != x.device or weight.dtype is not x.dtype:
        return Reason(
            f"its input is {x.dtype} on {x.device} and {name} {weight.dtype} on {weight.device}"
        )
    return None


def _device_reason(x: Tensor) -> Reason | None:
    """Why the products cannot run on the device of ``x``, or ``None``."""
    kind = x.device.type
    if is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not x.dtype:
        return Reason(f"autocast to {torch.get_autocast_dtype(kind)} is on")
    if kind != "cpu" and not hasattr(torch.nn.functional, "grouped_mm"):
        return Reason("this torch has no grouped_mm")
    return None


class Update(NamedTuple):
    """The low-rank update of one stack of expert weights, as ``grouped_lora`` takes it.

    Attributes:
        A: ``[E, R, K]``.
        B: ``[E, N, R]``.
        scale: ``Float[E]``.
    """

    A: Tensor
    B: Tensor
    scale: Tensor


def _update(wrapper: Any, found: Adapter, device: torch.device) -> Update:
    """The update of one stack. PEFT stores A as ``[E · R, K]`` with the rank fastest, B as ``[N, R · E]`` with the expert fastest."""
    E: int = wrapper.num_experts
    A, B = found.A.weight, found.B.weight
    scale = torch.full((E,), float(wrapper.scaling[found.name]), dtype=A.dtype, device=device)
    return Update(
        A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1).contiguous(), scale
    )


def routed(
    experts: Any, updates: dict[str, Update], hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The forward of a mixture of experts as transformers defines it, with low-rank updates of its stacked weights.

    Rows are sorted by expert once, so that the rows of each expert are contiguous in every product.

    Args:
        experts: The module with the stacked weights; its class is decorated with ``use_experts_implementation``.
        updates: Updates by the name of the parameter.
        hidden: ``[tokens, hidden_size]``.
        chosen: ``Int[tokens, choices]``, the experts of each token.
        weights: ``[tokens, choices]``, the factors of the experts' outputs.

    Returns:
        ``[tokens, hidden_size]``.
    """
    choices, packed = chosen.shape[-1], packed_stacks(experts)
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    plan = plan_groups(ids, experts.num_experts)
    counts = torch.bincount(ids, minlength=experts.num_experts)

    def project(name: str, x: Tensor) -> Tensor:
        if name in packed:
            y = packed_product(x, packed[name], counts, experts.is_transposed)
        else:
            y = grouped_product(x, getattr(experts, name), counts, experts.is_transposed)
        if experts.has_bias:
            y = y + getattr(experts, f"{name}_bias")[ids]
        update = updates.get(name)
        return y if update is None else grouped_lora(y, x, *update, plan)

    x = hidden[order // choices]
    if experts.has_gate:
        x = experts._apply_gate(project("gate_up_proj", x))
    else:
        x = experts.act_fn(project("up_proj", x))
    y = project("down_proj", x)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return y[place].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """``x[rows of e] W[e]ᵀ`` for the rows of every expert ``e``. The weights are frozen.

    Args:
        x: ``[M, K]``, sorted by expert.
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``.
        counts: ``Int[E]``, the number of rows of each expert.
        transposed: The layout of ``weight``.

    Returns:
        ``[M, N]``.
    """
    if x.device.type == "cpu":
        return _Products.apply(x, weight, counts.tolist(), transposed)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.grouped_mm(x, weight if transposed else weight.mT, offs=offsets)


class _Products(torch.autograd.Function):
    """``grouped_product`` on the CPU, with ``dx[rows of e] = dy[rows of e] W[e]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int], transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.counts, ctx.transposed = counts, transposed
        return _by_expert(x, weight.mT if transposed else weight, counts, matmul_nt, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = weight.mT if ctx.transposed else weight
        return _by_expert(dy, weight, ctx.counts, matmul_nn, -1), None, None, None


def _by_expert(x: Tensor, weight: Tensor, counts: list[int], product: Any, axis: int) -> Tensor:
    out, start = x.new_empty(x.shape[0], weight.shape[axis]), 0
    for matrix, count in zip(weight, counts, strict=True):
        if count:
            out[start : start + count] = product(x[start : start + count], cast(matrix, x.dtype))
        start += count
    return out
