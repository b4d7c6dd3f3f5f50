"""Logits that are computed when somebody reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from peftkit_kernels.checks import is_autocast_enabled, without_autocast
from peftkit_kernels.linear_cross_entropy import RowLoss
from peftkit_kernels.low_rank import LoRA


class HeadTensors(NamedTuple):
    """What an output head computes with: ``h Wᵀ + bias``, and ``scale · h Aᵀ Bᵀ`` where it carries a LoRA adapter."""

    weight: Tensor
    bias: Tensor | None
    lora: LoRA | None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How logits follow from ``(hidden, weight, bias, lora_A, lora_B)``."""

    lora_scale: float
    dtype: torch.dtype
    """Of the product with the weight."""
    autocast: bool
    steps: tuple[tuple[Any, tuple[Any, ...]], ...] = ()
    """Functions applied to the logits since, each with its arguments after the first."""

    def evaluate(self, tensors: tuple[Any, ...]) -> Tensor:
        """The logits, as ``nn.Linear`` or PEFT's LoRA layer computes them."""
        hidden, weight, bias, A, B = tensors
        with without_autocast(hidden):
            rows = hidden.to(self.dtype)
            y = F.linear(rows, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))
            if A is not None:
                dtype = self.dtype if self.autocast else A.dtype
                update = (
                    F.linear(F.linear(hidden.to(dtype), A.to(dtype)), B.to(dtype)) * self.lora_scale
                )
                y = (y + update).to(y.dtype)
            for function, args in self.steps:
                y = function(y, *args)
        return y


class LazyLogits(torch.Tensor):
    """Logits ``[..., V]`` of an output head, computed at the first use of their values and kept from then on.

    Size, dtype, device and ``requires_grad`` are known without computing anything. Widening casts, multiplication and
    division by a number, and tanh are remembered instead of run, so that ``row_loss`` can hand them to a loss that works on
    the hidden states. Any other use sees ordinary logits, connected to the hidden states by autograd: the gradients of a
    loss made of them are those of ordinary logits. (The model's own loss is not made of them: ``autograd.grad`` of it with
    respect to the logits says so.)
    """

    _recipe: _Recipe
    _tensors: tuple[Any, ...]
    _versions: tuple[int, ...]
    _real: Tensor | None

    @staticmethod
    def make(hidden: Tensor, head: HeadTensors) -> LazyLogits:
        """The logits of ``hidden [..., D]``.

        Raises:
            TypeError: ``hidden`` and the weight differ in dtype and autocast is off, which ``nn.Linear`` refuses as well.
        """
        autocast = is_autocast_enabled(hidden.device.type)
        autocast = autocast and hidden.dtype is not torch.float64
        if not autocast and hidden.dtype is not head.weight.dtype:
            raise TypeError(f"hidden states are {hidden.dtype} and the head is {head.weight.dtype}")
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        lora = head.lora
        tensors = hidden, head.weight, head.bias, lora and lora.A, lora and lora.B
        recipe = _Recipe(lora.scale if lora else 1.0, dtype, autocast)
        return _Lazy.apply(recipe, dtype, *tensors)

    @property
    def hidden(self) -> Tensor:
        """The hidden states the logits follow from."""
        return self._tensors[0]

    @property
    def head(self) -> HeadTensors:
        """The tensors of the head."""
        _, weight, bias, A, B = self._tensors
        return HeadTensors(weight, bias, None if A is None else LoRA(A, B, self._recipe.lora_scale))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the product with the head."""
        return self._recipe.dtype

    def row_loss(self) -> RowLoss | None:
        """The remembered steps as a scale and a softcap; ``None`` if they are something else, or were run already."""
        if self._real is not None:
            return None
        # Exact fractions, so that dividing and multiplying by the same number leaves exactly one.
        before, after, capped = Fraction(1), Fraction(1), False
        for function, args in self._recipe.steps:
            if function is torch.tanh:
                if capped:
                    return None
                capped = True
            elif function in (torch.mul, torch.div):
                factor = Fraction(args[0]) if function is torch.mul else 1 / Fraction(args[0])
                before, after = (before, after * factor) if capped else (before * factor, after)
        if not capped:
            return RowLoss(logit_scale=float(before))
        return (
            RowLoss(logit_scale=float(before * after), softcap=float(after)) if after > 0 else None
        )

    def real(self) -> Tensor:
        """The logits as an ordinary tensor.

        Raises:
            RuntimeError: The hidden states or the head changed in place since the forward.
        """
        if self._real is None:
            self._check_unchanged()
            with torch.set_grad_enabled(self.requires_grad):
                real: Tensor = _Real.apply(self)
            self._real = real
            return real
        return self._real

    def _check_unchanged(self) -> None:
        if _versions(self._tensors) != self._versions:
            raise RuntimeError(
                "these logits were not computed in the forward, and their hidden states or the output head have been "
                "changed in place since; read them before the optimizer's step, or use logit_free=False"
            )

    def _values(self) -> Tensor:
        """The logits without a graph."""
        return self._recipe.evaluate(self._tensors) if self._real is None else self._real.detach()

    def _remember(self, function: Any, args: tuple[Any, ...]) -> LazyLogits | None:
        """These logits after ``function``, still not computed, or ``None`` if it is not one of those remembered."""
        if function is torch.Tensor.contiguous and not args:
            return self
        if function is torch.Tensor.float and not args:
            function, args = torch.Tensor.to, (torch.float32,)
        dtype = self.dtype
        if function is torch.Tensor.to:
            if len(args) != 1 or not isinstance(args[0], torch.dtype):
                return None
            if args[0] is dtype:
                return self
            if not args[0].is_floating_point or torch.promote_types(dtype, args[0]) is not args[0]:
                return None
            dtype = args[0]
        elif function in _PRODUCTS:
            function = _PRODUCTS[function]
            if len(args) != 1 or type(args[0]) not in (int, float):
                return None
            if args[0] == 0 or not math.isfinite(args[0]):
                return None
        elif function in (torch.tanh, torch.Tensor.tanh) and not args:
            function = torch.tanh
        else:
            return None
        recipe = replace(self._recipe, steps=(*self._recipe.steps, (function, args)))
        return _Lazy.apply(recipe, dtype, *self._tensors)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN_WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyLogits) and args[0]._real is None and not kwargs:
            lazy = args[0]._remember(func, args[1:])
            if lazy is not None:
                return lazy
        return func(*tree_map(_real_of, args), **tree_map(_real_of, kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached by callers below Python's torch functions only, such as collectives and other libraries' kernels.
        return func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs or {}))


class _Lazy(torch.autograd.Function):
    """A node of the graph for logits that do not exist; its backward is that of the head and the remembered steps."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, dtype: torch.dtype, *tensors: Any) -> Tensor:
        hidden, weight = tensors[:2]
        lazy = torch.Tensor._make_wrapper_subclass(
            LazyLogits, (*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device=hidden.device
        )
        lazy._recipe, lazy._tensors, lazy._versions = recipe, tensors, _versions(tensors)
        lazy._real = None
        ctx.save_for_backward(*tensors)
        ctx.recipe = recipe
        return lazy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch.enable_grad():
            y = ctx.recipe.evaluate(tensors)
        inputs = [t for t, need in zip(tensors, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=torch.is_grad_enabled()))
        return None, None, *(next(grads) if need else None for need in needed)


class _Real(torch.autograd.Function):
    """From logits that do not exist to ordinary ones: the identity for gradients, so hooks on the former see them."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy._values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _versions(tensors: tuple[Any, ...]) -> tuple[int, ...]:
    """How often each tensor was changed in place; tensors of inference mode do not count."""
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def _real_of(value: Any) -> Any:
    return value.real() if isinstance(value, LazyLogits) else value


def _values_of(value: Any) -> Any:
    return value._values() if isinstance(value, LazyLogits) else value


_PRODUCTS = {
    torch.mul: torch.mul,
    torch.multiply: torch.mul,
    torch.Tensor.mul: torch.mul,
    torch.Tensor.multiply: torch.mul,
    torch.Tensor.__mul__: torch.mul,
    torch.Tensor.__rmul__: torch.mul,
    torch.div: torch.div,
    torch.divide: torch.div,
    torch.true_divide: torch.div,
    torch.Tensor.div: torch.div,
    torch.Tensor.divide: torch.div,
    torch.Tensor.true_divide: torch.div,
    torch.Tensor.__truediv__: torch.div,
}

_KNOWN_WITHOUT_VALUES = frozenset(
    {
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "_backward_hooks",
                "_version",
                "device",
                "dtype",
                "grad",
                "grad_fn",
                "is_cpu",
                "is_cuda",
                "is_leaf",
                "is_meta",
                "is_nested",
                "is_quantized",
                "is_sparse",
                "itemsize",
                "layout",
                "nbytes",
                "ndim",
                "output_nr",
                "requires_grad",
                "retains_grad",
                "shape",
            )
        ),
        torch.Tensor.__len__,
        torch.Tensor.dim,
        torch.Tensor.element_size,
        torch.Tensor.get_device,
        torch.Tensor.is_complex,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_inference,
        torch.Tensor.nelement,
        torch.Tensor.numel,
        torch.Tensor.register_hook,
        torch.Tensor.retain_grad,
        torch.Tensor.size,
        torch.Tensor.storage_offset,
        torch.Tensor.stride,
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    }
)
"""What a use of the logits may ask without their being computed."""
