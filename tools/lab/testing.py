"""Measurements for the tests of the ops: running-error bounds, error against float64, bytes kept, tensors created."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of rounding to nearest."""

_TF32_ROUNDOFF = 2.0**-10
"""Largest relative error of dropping the bits that a TF32 tensor core does not read."""

_HALVES_ROUNDOFF = 2.0**-16
"""Largest relative error of a float32 number as the sum of two bfloat16 numbers, and of omitting the product of the low parts."""

_HALF_SMALLEST = {
    torch.float64: 0.0,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}
"""Largest absolute error of rounding a number below the normal range."""


class Bound:
    """The exact value of an expression, and for every element a bound on the error of computing it.

    Write the algorithm once more on ``Bound`` values, with the same roundings in the same places. The result says how far
    each element may be from the exact value. Unlike one tolerance for the whole tensor, this check fails for a dropped term,
    an extra rounding or a sum in too narrow a dtype, and no number is tuned to a shape::

        s = (Bound.of(x) @ Bound.of(A).T).round(torch.bfloat16)
        y = (Bound.of(x) @ Bound.of(W).T).round(torch.bfloat16)
        y.addmm(s, Bound.of(B).T, scale).round(torch.bfloat16).check(actual)

    Args:
        value: The exact value, in float64.
        error: ``Float64`` of the same shape, at least zero.
        unit: Unit roundoff of the dtype that intermediate results and sums are held in.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.3.
    """

    def __init__(self, value: Tensor, error: Tensor, unit: float):
        self.value, self.error, self.unit = value, error, unit

    @classmethod
    def of(cls, tensor: Tensor) -> Bound:
        """An input, without error. Sums of float64 tensors are held in float64, all others in float32."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        value = tensor.detach().double()
        return cls(value, torch.zeros_like(value), UNIT_ROUNDOFF[wide])

    @property
    def T(self) -> Bound:  # noqa: N802 - the name torch gives it
        """Rows and columns exchanged."""
        return Bound(self.value.T, self.error.T, self.unit)

    def __matmul__(self, other: Bound) -> Bound:
        """Whatever the order of summation, K products and sums cost at most ``(K + 1)`` units of ``|a| |b|``."""
        left, right = self.value.abs(), other.value.abs()
        error = left @ other.error + self.error @ right + self.error @ other.error
        rounding = (self.value.shape[-1] + 1) * self.unit * (left @ right + error)
        return Bound(self.value @ other.value, error + rounding, self.unit)

    def addmm(self, left: Bound, right: Bound, alpha: float = 1.0) -> Bound:
        """``self + alpha · left right``, where the sums may start from ``self``."""
        total = self + left @ right * alpha
        rounding = (left.value.shape[-1] + 1) * self.unit * (self.value.abs() + self.error)
        return Bound(total.value, total.error + rounding, self.unit)

    def __add__(self, other: Bound) -> Bound:
        value, error = self.value + other.value, self.error + other.error
        return Bound(value, error + self.unit * (value.abs() + error), self.unit)

    def __sub__(self, other: Bound) -> Bound:
        return self + Bound(-other.value, other.error, other.unit)

    def __getitem__(self, index: Any) -> Bound:
        return Bound(self.value[index], self.error[index], self.unit)

    def __mul__(self, other: Bound | Tensor | float) -> Bound:
        """The product with another bound, or with an exact number or tensor."""
        if not isinstance(other, Bound):
            exact = torch.as_tensor(other, dtype=torch.float64)
            other = Bound(exact, torch.zeros_like(exact), self.unit)
        value = self.value * other.value
        error = self.value.abs() * other.error + self.error * (other.value.abs() + other.error)
        return Bound(value, error + self.unit * (value.abs() + error), self.unit)

    @staticmethod
    def cat(bounds: Sequence[Bound], dim: int) -> Bound:
        """Several bounds joined along one axis."""
        value = torch.cat([bound.value for bound in bounds], dim)
        error = torch.cat([bound.error for bound in bounds], dim)
        return Bound(value, error, bounds[0].unit)

    def reshape(self, *shape: int) -> Bound:
        """The same elements in another shape."""
        return Bound(self.value.reshape(shape), self.error.reshape(shape), self.unit)

    def round(self, dtype: torch.dtype) -> Bound:
        """The bound after rounding to ``dtype``."""
        rounding = UNIT_ROUNDOFF[dtype] * (self.value.abs() + self.error) + _HALF_SMALLEST[dtype]
        return Bound(self.value, self.error + rounding, self.unit)

    def tf32(self) -> Bound:
        """The bound after a TF32 tensor core has read the value."""
        size = self.value.abs() + self.error
        return Bound(self.value, self.error + _TF32_ROUNDOFF * size, self.unit)

    def halves(self) -> Bound:
        """The bound of the value as the sum of two bfloat16 numbers, as ``tiles.mixed_dot`` with ``"halves"`` uses it."""
        size = self.value.abs() + self.error
        return Bound(self.value, self.error + _HALVES_ROUNDOFF * size, self.unit)

    def sum(self, dim: int, keepdim: bool = False) -> Bound:
        """The sum over one axis, in any order."""
        error = self.error.sum(dim, keepdim)
        size = self.value.abs().sum(dim, keepdim) + error
        rounding = self.value.shape[dim] * self.unit * size
        return Bound(self.value.sum(dim, keepdim), error + rounding, self.unit)

    def map(
        self,
        function: Callable[[Tensor], Tensor],
        slope: float | Tensor,
        ulps: float,
        size: Callable[[Tensor], Tensor] = torch.abs,
    ) -> Bound:
        """An elementary function.

        Args:
            function: Evaluated exactly (in float64).
            slope: Bound on ``|function'|`` between the exact argument and the computed one.
            ulps: Error of evaluating it, in units of ``size``.
            size: The size of the intermediate results, as a function of the argument. It is larger than the result if
                intermediate results cancel.
        """
        rounding = ulps * self.unit * torch.maximum(size(self.value), function(self.value).abs())
        return Bound(function(self.value), slope * self.error + rounding, self.unit)

    def check(self, actual: Tensor, name: str = "result") -> float:
        """The largest error of ``actual``, as a fraction of its bound.

        Raises:
            AssertionError: An element is further from the exact value than its bound, is not finite, or the shape differs.
        """
        assert actual.shape == self.value.shape, (
            f"{name} has shape {tuple(actual.shape)}, expected {tuple(self.value.shape)}"
        )
        if not actual.numel():
            return 0.0
        # the "exact" value is computed in float64, so its own error may be as large as that of a float64 result
        allowed = self.error * (2.0 if self.unit == UNIT_ROUNDOFF[torch.float64] else 1.0)
        # a slope evaluated outside the function's domain can be negative, and then any value would pass
        assert (allowed >= 0).all(), f"{name}: the error bound is negative or NaN somewhere"
        off = (actual.detach().double() - self.value).abs()
        ratio = torch.where(off == 0, 0.0, off / allowed).nan_to_num(nan=torch.inf)
        worst = int(ratio.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        largest = float(ratio.flatten()[worst])
        assert largest <= 1.0, (
            f"{name}: {largest:.3g} times the error bound at {where}: got {actual.flatten()[worst].item()}, "
            f"exact {self.value.flatten()[worst].item()} ± {allowed.flatten()[worst].item():.3g}"
        )
        return largest


FEW = 32
"""Fewer numbers than this have an error that is small or large by chance."""


def assert_no_worse_than(
    actual: Tensor, plain: Tensor, truth: Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """Raise unless ``actual`` is about as near to ``truth`` as ``plain`` is.

    Args:
        actual: The result under test.
        plain: The same by plain torch, in the same dtype.
        truth: The same in float64.
        name: The name of ``actual`` in the error message.
        factor: How many times the error of ``plain`` is allowed, plus one rounding at the size of the result; twice as many times for
            fewer than ``FEW`` numbers.

    Raises:
        AssertionError: The error is larger, the shapes or dtypes differ, or the numbers are too small for a wrong result
            to be noticed.
    """
    assert actual.shape == plain.shape == truth.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(plain.shape)} and {tuple(truth.shape)} differ"
    )
    assert actual.dtype == plain.dtype, f"{name} is {actual.dtype}, plain torch's is {plain.dtype}"
    if not actual.numel():
        return
    few = 2 if truth.numel() < FEW else 1
    error, allowed = error_and_allowed(actual, plain, truth, few * factor)
    largest = float(truth.detach().double().abs().max())
    assert largest > 10 * allowed, (
        f"{name}: elements are at most {largest:.3g} in size, and an error of {allowed:.3g} is allowed; a wrong result would pass"
    )
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def error_and_allowed(
    actual: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0
) -> tuple[float, float]:
    """The largest error of ``actual`` and the error allowed; arguments as ``assert_no_worse_than``, not empty."""
    truth = truth.detach().double()
    floor = torch.finfo(actual.dtype).eps * float(truth.abs().max())
    allowed = factor * float((plain.detach().double() - truth).abs().max()) + floor
    return float((actual.detach().double() - truth).abs().max()), allowed


class Kept:
    """The distinct storages that autograd keeps for backward."""

    def __init__(self, weights: Iterable[Tensor]):
        self._known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.storages: dict[int, int] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all storages kept, except those of the weights."""
        return sum(self.storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextlib.contextmanager
def kept_for_backward(*weights: Tensor) -> Iterator[Kept]:
    """Count the bytes that autograd keeps for operations inside this context, except those of ``weights``.

    Keep the results alive until the count is read: a new storage could get the address of a freed one.
    """
    kept = Kept(weights)
    with torch.autograd.graph.saved_tensors_hooks(kept._pack, lambda tensor: tensor):
        yield kept


class Made(TorchDispatchMode):
    """Records the torch ops that run inside this mode and the storages of the tensors they return.

    Attributes:
        calls: How many ops ran, including views.
        storages: Bytes by address of every returned storage, except those of the tensors given.
    """

    sees_native_calls = True

    def __init__(self, *known: Tensor):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.calls = 0
        self.storages: dict[int, int] = {}

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest storage."""
        return max(self.storages.values(), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in self._known:
                storage = part.untyped_storage()
                self.storages[storage.data_ptr()] = max(
                    storage.nbytes(), self.storages.get(storage.data_ptr(), 0)
                )
        return result
