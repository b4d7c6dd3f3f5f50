"""Tensors whose values are computed each time they are used: stacks of experts that are decoded or assembled for one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from peftkit.base.storage import NF4Storage
from peftkit.find.stacks import PackedStack, packed_stacks, replace_stacks


class LazyTensor(Tensor):
    """A tensor without memory. Stacking, concatenating and transposing such tensors gives another one; other operations compute the values.

    Attributes:
        compute: Returns the values.
    """

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: Any, dtype: torch.dtype, device: Any = "cpu"
    ) -> LazyTensor:
        """Create a tensor.

        Args:
            compute: Returns the values; they may have another floating-point dtype than ``dtype``.
            shape: The shape of the values.
            dtype: The dtype that the tensor shows.
            device: The device of the values.
        """
        made: Any = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.compute = compute
        return made

    def __deepcopy__(self, memo: Any) -> Tensor:
        values = self.compute().to(self.dtype).clone()
        is_parameter = isinstance(self, nn.Parameter)
        memo[id(self)] = nn.Parameter(values, self.requires_grad) if is_parameter else values
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            tensor = args[0]
            return cls(tensor.compute, tensor.shape, tensor.dtype, tensor.device)
        tensors = list(_tensors_in(args))
        if func in _RECORDED and all(isinstance(tensor, LazyTensor) for tensor in tensors):
            shown = func(*tree_map(_shape_of, args), **kwargs)
            return cls(_Recorded(func, args, kwargs), shown.shape, shown.dtype, tensors[0].device)
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs))


_RECORDED = (
    torch.ops.aten.stack.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.transpose.int,
)
"""What transformers does with the weights of single experts when it reads a checkpoint."""


class _Recorded:
    """An operation that is repeated each time its result is used."""

    def __init__(self, func: Any, args: Any, kwargs: Any):
        self._func, self._args, self._kwargs = func, args, kwargs

    def __call__(self) -> Tensor:
        return self._func(*tree_map(_computed, self._args), **self._kwargs).contiguous()


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor, detached; computed if it is lazy."""
    return tensor.compute() if isinstance(tensor, LazyTensor) else tensor.detach()


def decoded_stacks(module: nn.Module) -> dict[str, LazyTensor]:
    """The stacks in four bits of one module, by their names in it. Their values are decoded to float32."""
    return {name: _decoded(stack) for name, stack in packed_stacks(module).items()}


def decode_when_used(model: nn.Module) -> None:
    """Replace the stacks in four bits of a copied model by parameters that are decoded to float32 each time they are used."""
    for module in model.modules():
        replace_stacks(module, _decoded)


def _decoded(stack: PackedStack) -> LazyTensor:
    packed, state = stack.packed.data, stack.state
    return LazyTensor(NF4Storage(packed, state).dense, state.shape, state.dtype, packed.device)


def _tensors_in(args: Any) -> Iterator[Tensor]:
    for arg in args:
        yield from (
            part
            for part in (arg if isinstance(arg, (list, tuple)) else (arg,))
            if isinstance(part, Tensor)
        )


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, LazyTensor) else value


def _shape_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
