"""Stacks of expert weights that bitsandbytes stores in four bits: a parametrised parameter, decoded whenever it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.swap import own_class

ORDER = "_parameter_order"
"""The attribute of a module with the names of its parameters in their order before the first was packed."""

_HIDDEN = "_hidden_stacks"
"""The attribute of a module with its class, its parametrisations and the names of its stacks while they are shown as plain parameters."""

MERGE_DENSE = "Write a merged model in 16 bits instead: peftkit.merge(model, OUT, dtype='bf16')"


class PackedStack(NamedTuple):
    """A stack of weights ``[E, N, K]`` in four bits.

    Attributes:
        packed: ``UInt8[numel/2, 1]``, the parameter.
        state: bitsandbytes' ``QuantState``: shape, dtype and block maxima.
    """

    packed: Tensor
    state: Any

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.state.shape)


def packed_stack(module: nn.Module, name: str) -> PackedStack | None:
    """The stack ``module.name`` if it is stored in four bits and nothing else changes it, such as an adapter of PEFT's forward."""
    return packed_stacks(module).get(name)


def packed_stacks(module: nn.Module) -> dict[str, PackedStack]:
    """The parameters of one module that are stored in four bits, by their names in the module."""
    lists = module._modules.get("parametrizations")
    found = {}
    for name, steps in lists.named_children() if lists is not None else ():
        packed = packed_parameter(steps)
        if packed is not None:
            found[name] = packed
    return found


def packed_parameter(steps: Any) -> PackedStack | None:
    """The stack in a torch ``ParametrizationList``, or ``None`` if this module is none, or has other steps."""
    children = list(steps._modules.values())
    if len(children) != 1 or type(children[0]).__name__ != "Bnb4bitParametrization":
        return None
    return PackedStack(steps._parameters["original"], children[0].quant_state)


def replace_stacks(
    module: nn.Module, value_of: Callable[[PackedStack], Tensor]
) -> dict[str, PackedStack]:
    """Give one module the class and the parameters that it had before its stacks were packed.

    Args:
        module: Any module; changed if packed stacks are all that is parametrised in it.
        value_of: Returns the value of the parameter for a stack.

    Returns:
        The stacks that were replaced, by their names in the module.
    """
    stacks = packed_stacks(module)
    if not stacks or len(stacks) != len(module.get_submodule("parametrizations")._modules):
        return {}
    del module._modules["parametrizations"]
    # torch makes a subclass whose properties decode the parameters
    module.__class__ = own_class(module).__bases__[0]
    for name, stack in stacks.items():
        module._parameters[name] = nn.Parameter(value_of(stack), requires_grad=False)
    order = module.__dict__.get(ORDER, list(module._parameters))
    module._parameters = {n: module._parameters[n] for n in order}
    return stacks


def _without_memory(stack: PackedStack) -> Tensor:
    value = torch.empty(1, dtype=stack.state.dtype, device=stack.packed.device)
    return value.expand(tuple(stack.state.shape))


@contextmanager
def as_plain_parameters(model: nn.Module) -> Iterator[None]:
    """Show packed stacks as plain parameters, of the same shape and without memory, while PEFT creates its layers.

    PEFT finds parametrised parameters by their full names only, and in another order than plain ones. The order decides the names of the
    factors, so an adapter would not fit the same model in 16 bits.
    """
    hidden = [module for module in list(model.modules()) if _hide(module)]
    try:
        yield
    finally:
        for module in hidden:
            _show(module)


@contextmanager
def for_a_forward(model: nn.Module) -> Iterator[None]:
    """Undo ``as_plain_parameters`` for a forward, which needs the weights."""
    hidden = [module for module in list(model.modules()) if _HIDDEN in module.__dict__]
    for module in hidden:
        _show(module)
    try:
        yield
    finally:
        for module in hidden:
            _hide(module)


def _hide(module: nn.Module) -> bool:
    before = type(module), module._modules.get("parametrizations")
    stacks = replace_stacks(module, _without_memory)
    if stacks:
        module.__dict__[_HIDDEN] = *before, list(stacks)
    return bool(stacks)


def _show(module: nn.Module) -> None:
    cls, lists, names = module.__dict__.pop(_HIDDEN)
    for name in names:
        del module._parameters[name]
    module._modules["parametrizations"] = lists
    module.__class__ = cls
