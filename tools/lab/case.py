"""A case: an operation, its tensors and its definition, and the functions that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a case.

    Attributes:
        M: Rows.
        K: Width of the input.
        N: The other width: of the output, the inner width of an MLP, the vocabulary. In ``lora_qkv`` the width of q; k and v
            have a quarter of it.
        R: Rank, or width of a bottleneck.
        p: Dropout of the adapters.
    """

    M: int
    K: int
    N: int
    R: int = 16
    p: float = 0.0


@dataclass(frozen=True)
class Case:
    """An operation and the tensors it is applied to, by name.

    Attributes:
        leaves: The tensors; those that require a gradient are trained.
        call: The operation, a function of the tensors and a backend.
        plain: The same as ordinary torch code, with torch's dropout kernel; ``None`` if the definition is that code.
        frozen: ``plain`` without the trained parts; ``None`` if nothing remains.
        by_rows: If ``call`` returns one number, in which errors cancel: the same with one number for each row.
        frozen_bytes: Bytes that the element-wise passes of ``frozen`` move, forward and backward, each fused into one pass.
    """

    leaves: Tensors
    call: Callable[[Tensors, Any], Any]
    plain: Callable[[Tensors], Any] | None = None
    frozen: Callable[[Tensors], Any] | None = None
    by_rows: Callable[[Tensors, Any], Any] | None = None
    frozen_bytes: int = 0

    def eager(self, leaves: Tensors) -> Any:
        """The outputs, computed by plain torch."""
        return self.call(leaves, "reference") if self.plain is None else self.plain(leaves)

    def run(self, backend: str) -> Tensors:
        """Every output and gradient, by name."""
        return step(lambda leaves: self.call(leaves, backend), self.leaves)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in ``dtype``."""

        def cast(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)

        return replace(self, leaves={name: cast(leaf) for name, leaf in self.leaves.items()})


def step(function: Callable[[Tensors], Any], leaves: Tensors) -> Tensors:
    """``function(leaves)`` and the gradients of a fixed weighted sum of its outputs, by name."""
    outputs = function(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if trained and outputs[0].requires_grad:
        grads = torch.autograd.grad(
            outputs, list(trained.values()), output_grads(outputs), allow_unused=True
        )
        found = {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}
        values |= {f"d{name}": grad for name, grad in found.items()}
    return values


def output_grads(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient for every output, different in each element."""
    grads = []
    for y in outputs:
        if y.device.type == "meta":
            grads.append(torch.empty_like(y))
        else:
            generator = torch.Generator().manual_seed(1)
            values = torch.randn(y.shape, generator=generator)
            grads.append(values.to(y))
    return grads


class Draw:
    """Makes the tensors of a case: normally distributed numbers, or only shapes on the meta device."""

    def __init__(self, dtype: torch.dtype, device: str, factors: torch.dtype | None):
        self.dtype, self.device, self.factors = dtype, device, factors or dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(
        self,
        *shape: int,
        trained: bool = False,
        size: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A tensor whose elements have standard deviation ``size``."""
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(trained)
        values = torch.randn(shape, generator=self._generator) * size
        return values.to(self.device, dtype).requires_grad_(trained)

    def integers(self, count: int, below: int) -> Tensor:
        """``Int64[count]`` in [0, below)."""
        if self.device == "meta":
            return torch.empty(count, dtype=torch.int64, device="meta")
        return torch.randint(below, (count,), generator=self._generator).to(self.device)

    def weight(self, N: int, K: int) -> Tensor:
        """A frozen weight."""
        return self(N, K, size=K**-0.5)

    def adapter(self, N: int, K: int, R: int, suffix: str = "") -> Tensors:
        """The two factors of an adapter."""
        A = self(R, K, trained=True, size=K**-0.5, dtype=self.factors)
        B = self(N, R, trained=True, size=R**-0.5, dtype=self.factors)
        return {f"A{suffix}": A, f"B{suffix}": B}
