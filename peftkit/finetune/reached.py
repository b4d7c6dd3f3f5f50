"""Which modules the loss of a batch depends on, found by one forward and backward without gradients of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftkit.checks.reach import loss_of, undisturbed
from peftkit.find.modules import is_linear_like


def modules_outside_loss(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers and convolutions that the loss does not depend on, such as the last layer of LLaVA's image encoder.

    Args:
        model: A model without adapters; it is not changed.
        batch: The arguments of its forward, with labels, on its device.
    """
    names = [
        name
        for name, module in model.named_modules()
        if is_linear_like(module) or isinstance(module, nn.modules.conv._ConvNd)
    ]
    reached: set[str] = set()
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [
        model.get_submodule(name).register_forward_hook(_Marks(name, reached)) for name in names
    ]
    try:
        with undisturbed(model):
            for parameter in trained:
                parameter.requires_grad_(False)
            loss_of(model, batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return [name for name in names if name not in reached]


class _Marks:
    """A forward hook: notes when a gradient arrives at the output of a module."""

    def __init__(self, name: str, reached: set[str]):
        self.name, self.reached = name, reached

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        # A copy, because models may change the output in place.
        output = output.clone()
        output.register_hook(self._mark)
        return output

    def _mark(self, gradient: Tensor) -> None:
        self.reached.add(self.name)
