"""Experts whose stacks are stored in four bits, with or without adapters, without keeping a decoded stack for the backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkit.find.stacks import packed_stacks
from peftkit.fuse.adapter import EXPERT_FLAGS, is_own_function
from peftkit.fuse.experts import experts_reason, in_autocast_dtype, routed
from peftkit.fuse.plan import Fused, Reason
from peftkit.swap import own_class, swap_in, swapped_in
from peftkit_kernels.core.checks import autocast_dtype
from peftkit_kernels.core.dispatch import choose_backend


class FusedPackedExperts(Fused):
    """A module of experts whose forward decodes its stacks where they are multiplied, and again in the backward.

    If an adapter of PEFT wraps the module and is fused, the adapter's forward replaces this one.
    """

    peftkit_method = "experts in 4 bits"

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward, fused if ``peftkit_plan`` says so.

        Args:
            x: ``[tokens, hidden_size]``.
            args: The chosen experts of every token and their weights, ``[tokens, choices]`` each.
            kwargs: As for the module's own forward, which runs if there are any.
        """
        if kwargs or len(args) != 2:
            return super().forward(x, *args, **kwargs)
        if autocast_dtype(x) not in (None, x.dtype):
            return in_autocast_dtype(self.forward, x, *args)
        if isinstance(self.peftkit_plan(x), Reason):
            return super().forward(x, *args)
        return routed(self, {}, x, *args)

    def peftkit_plan(self: Any, x: Tensor) -> dict[str, Any] | Reason:
        """Empty, because there are no adapters, or the reason why the module's own forward runs."""
        if not is_own_function(own_class(self), "forward"):
            return Reason("its forward was replaced")
        return experts_reason(self, x) or {}

    def peftkit_example(self: Any) -> Tensor:
        """One row of input with the device and dtype of the decoded stacks."""
        stack = next(iter(packed_stacks(self).values()))
        name = "gate_up_proj" if self.has_gate else "up_proj"
        up = packed_stacks(self).get(name)
        shape = up.state.shape if up is not None else getattr(self, name).shape
        width = shape[1 if self.is_transposed else 2]
        return stack.packed.new_empty(1, width, dtype=stack.state.dtype)

    def peftkit_backend(self: Any, x: Tensor, parts: Any) -> str:
        """``"torch"`` or ``"triton"``."""
        return choose_backend("dequantize_nf4", "auto", x)


def fuse_packed_experts(model: nn.Module) -> None:
    """Fuse the experts of a model that have stacks in four bits and whose forward is that of transformers' ``ExpertsInterface``."""
    for module in model.modules():
        usual = all(hasattr(module, flag) for flag in EXPERT_FLAGS)
        if usual and packed_stacks(module) and FusedPackedExperts not in swapped_in(module):
            swap_in(module, FusedPackedExperts)
