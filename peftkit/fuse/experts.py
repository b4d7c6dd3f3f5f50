"""LoRA on parameters rather than modules: stacked expert weights and weights of linears, without forming ``W + B A``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from peftkit.fuse.compute import Frozen, linear
from peftkit.fuse.eligibility import has_hooks, obstacle
from peftkit.fuse.linear import FusedLoRA, takes_input
from peftkit_kernels.autograd import once_differentiable
from peftkit_kernels.checks import is_autocast_enabled
from peftkit_kernels.dispatch import choose_backend, is_transformed
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.grouped_lora import grouped_lora, plan_groups
from peftkit_kernels.low_rank import LoRA, cast


class FusedParamWrapper(ParamWrapper):
    """PEFT's ``ParamWrapper`` whose forward adds the low-rank products to the outputs instead of to the weights.

    PEFT nests one wrapper a parameter around a module; the outermost one computes for all of them.
    """

    _peftkit_fused = True
    _peftkit_stock = ParamWrapper
    peftkit_method = "LoRA"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, fused where it may be.

        Args:
            x: ``[..., in_features]``; for experts ``[tokens, hidden_size]``.
            args: For experts the chosen experts of every token and their weights, ``[tokens, choices]`` each.
            kwargs: As PEFT's own forward, which then runs.
        """
        if not kwargs and not args and (part := self.frozen_linear(x)) is not None:
            return linear(x, part)
        if not kwargs and len(args) == 2 and (updates := self._expert_updates(x)) is not None:
            return routed(self.get_base_layer(), updates, x, *args)
        return super().forward(x, *args, **kwargs)

    def frozen_linear(self, x: Tensor) -> Frozen | None:
        """The tensors of this forward where the parameter is the weight of a linear; else, and where PEFT's runs, ``None``."""
        base = self.get_base_layer()
        if type(base) is not nn.Linear or obstacle(self) is not None:
            return None
        name = next(name for name in self.active_adapters if name in self.lora_A)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        if not takes_input(x, base.weight, base.bias) or A.dtype is not B.dtype:
            return None
        return Frozen(base.weight, base.bias, LoRA(A, B, self.scaling[name]))

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is PEFT's own."""
        reason = next(filter(None, map(obstacle, self._chain())), None)
        if reason:
            return "peft", reason
        is_linear = type(self.get_base_layer()) is nn.Linear
        op = "lora_linear" if is_linear else "grouped_lora"
        rank = self.r[self.active_adapters[0]]
        return f"fused:{choose_backend(op, 'auto', self.get_param(), rank=rank)}", ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by a function: this class goes by the name of PEFT's."""
        return FusedLoRA.__reduce_ex__(self, protocol)  # pyright: ignore[reportArgumentType]

    def _chain(self) -> Iterator[Any]:
        """This wrapper and those inside it."""
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def _expert_updates(self, x: Tensor) -> dict[str, Update] | None:
        """The update of each adapted parameter by name, or ``None`` where PEFT's own forward has to run."""
        experts: Any = self.get_base_layer()
        if is_transformed() or getattr(experts, "_is_expert_parallel", False):
            return None
        updates = {}
        for wrapper in self._chain():
            if (wrapper is not self and has_hooks(wrapper)) or obstacle(wrapper):
                return None
            updates[wrapper.parameter_name] = _update(wrapper, x.device)
        # an outer wrapper that runs PEFT's forward has replaced its stack by the sum, which needs a gradient
        stacks = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
        return updates if all(_takes(x, experts._parameters.get(s)) for s in stacks) else None


FusedParamWrapper.__name__ = FusedParamWrapper.__qualname__ = "ParamWrapper"


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


def _update(wrapper: Any, device: torch.device) -> Update:
    """PEFT keeps A as ``[E · R, K]`` with the rank fastest, B as ``[N, R · E]`` with the expert fastest."""
    name, E = (
        next(name for name in wrapper.active_adapters if name in wrapper.lora_A),
        wrapper.num_experts,
    )
    A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    scale = torch.full((E,), float(wrapper.scaling[name]), dtype=A.dtype, device=device)
    return Update(
        A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1).contiguous(), scale
    )


def _takes(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the rows of ``x`` can be multiplied by a stack of weights as they are."""
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.device != x.device:
        return False
    kind = x.device.type
    autocast = is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not x.dtype
    on_cpu = kind == "cpu" or hasattr(torch.nn.functional, "grouped_mm")
    return x.dtype is weight.dtype and not autocast and on_cpu


def routed(
    experts: Any, updates: dict[str, Update], hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The forward of a mixture of experts as transformers defines it, with low-rank updates of its stacked weights.

    Rows are sorted by expert once; every product then runs over the rows of one expert after the other.

    Args:
        experts: The module that holds the stacks, of a class under ``use_experts_implementation``.
        updates: By the name of the parameter.
        hidden: ``[tokens, hidden_size]``.
        chosen: ``Int[tokens, choices]``, the experts of each token.
        weights: ``[tokens, choices]``, what their outputs are weighted with.

    Returns:
        ``[tokens, hidden_size]``.
    """
    choices = chosen.shape[-1]
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    plan = plan_groups(ids, experts.num_experts)
    counts = torch.bincount(ids, minlength=experts.num_experts)

    def project(name: str, x: Tensor) -> Tensor:
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
    """``x[rows of e] W[e]ᵀ`` for the rows of every expert, one expert's after the other's; the weights are frozen.

    Args:
        x: ``[M, K]``, sorted by expert.
        weight: ``[E, N, K]``, or ``[E, K, N]`` where ``transposed``.
        counts: ``Int[E]``, the rows of each expert.
        transposed: Which of the two.

    Returns:
        ``[M, N]``.
    """
    if x.device.type == "cpu":
        return _Products.apply(x, weight, counts.tolist(), transposed)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.grouped_mm(x, weight if transposed else weight.mT, offs=offsets)


class _Products(torch.autograd.Function):
    """``dx[rows of e] = dy[rows of e] W[e]``."""

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
