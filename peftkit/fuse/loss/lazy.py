"""Logits that are computed when they are read."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from peftkit.fuse.loss.head import Head, HeadOutput, Step
from peftkit.fuse.loss.uses import CASTS, KNOWN_WITHOUT_VALUES, PRODUCTS
from peftkit_kernels.ops.linear_cross_entropy import RowLoss, linear_cross_entropy


class LazyLogits(torch.Tensor):
    """Logits ``[..., V]`` of an output head. They are computed at the first use of their values and kept afterwards.

    Size, dtype, device and ``requires_grad`` are known before the logits are computed. The steps between a head and its loss
    (a cast to a wider dtype, multiplication and division by a number, tanh, another shape with the same last axis) are recorded and
    not run. ``torch.nn.functional.cross_entropy`` of the result is then computed from the hidden states, in chunks. Any other
    function gets ordinary logits, which autograd connects to the hidden states.

    A loss that was computed from the hidden states has no gradient for the logits. If this gradient was requested
    (``retain_grad``, ``register_hook``, ``autograd.grad(loss, logits)``), the backward of this loss raises ``RuntimeError``.
    """

    _output: HeadOutput
    _steps: tuple[Step, ...]
    _watch: _Watch
    _source: _Source
    _viewed: LazyLogits | None
    _real: Tensor | None

    @staticmethod
    def make(hidden: Tensor, head: Head) -> LazyLogits:
        """The logits of ``hidden [..., D]``. ``hidden`` has the dtype of the head unless autocast is on."""
        output = HeadOutput(hidden, head)
        return _FromHead.apply(output, *output.tensors)

    def real(self) -> Tensor:
        """The logits as an ordinary tensor.

        Raises:
            RuntimeError: The hidden states or the head have changed since the forward.
        """
        if self._real is None:
            if self._viewed is not None and self._viewed._real is not None:
                (function, args) = self._steps[-1]
                self._real = function(self._viewed._real, *args)
            else:
                with torch.set_grad_enabled(self.requires_grad):
                    self._real = _Real.apply(self)
        assert self._real is not None
        return self._real

    def _values(self) -> Tensor:
        """The logits without a graph."""
        if self._real is not None:
            return self._real.detach()
        self._source.output = self._output  # the reader of the values may send a gradient to them
        with torch.no_grad():
            return self._output.evaluate(self._steps)

    def row_loss(self) -> RowLoss | None:
        """The recorded steps as a scale and a softcap; ``None`` if they are other steps, or were run already."""
        if self._real is not None:
            return None
        # Exact fractions, so that dividing and multiplying by the same number gives exactly 1.
        before, after, capped = Fraction(1), Fraction(1), False
        for function, args in self._steps:
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

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """``torch.nn.functional.cross_entropy`` from the hidden states, or ``None`` if these arguments need ordinary logits.

        Args:
            target: ``Int64[M]``, for logits ``[M, V]``.
            weight: Must be ``None``, and so must ``size_average`` and ``reduce``.
            size_average: See ``weight``.
            ignore_index: Rows with this target do not count.
            reduce: See ``weight``.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
        """
        row_loss = self.row_loss()
        if row_loss is None or self.dtype not in (torch.float32, torch.float64):
            return None
        if not (weight is size_average is reduce is None) or not 0 <= label_smoothing < 1:
            return None
        if type(target) is not Tensor or target.dtype is not torch.int64:
            return None
        if self.dim() != 2 or target.shape != self.shape[:1] or target.device != self.device:
            return None
        head, hidden = self._output.head, self._output.hidden
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            target,
            bias=head.bias,
            lora=head.lora,
            ignore_index=ignore_index,
            reduction=reduction,  # pyright: ignore[reportArgumentType]
            softcap=row_loss.softcap,
            label_smoothing=label_smoothing,
            logit_scale=row_loss.logit_scale,
            compute_dtype=self._output.dtype,
        )
        return _Loss.apply(loss.to(self.dtype), self) if loss.requires_grad else loss.to(self.dtype)

    def _remember(self, function: Any, args: tuple[Any, ...]) -> LazyLogits | None:
        """The logits after ``function``, still not computed, or ``None`` if ``function`` cannot be recorded."""
        if function is torch.Tensor.contiguous and not args:
            return self
        if function in CASTS and not args:
            function, args = torch.Tensor.to, (CASTS[function],)
        dtype, shape, is_view = self.dtype, self.shape, False
        if function is torch.Tensor.to:
            if len(args) != 1 or not isinstance(args[0], torch.dtype):
                return None
            if args[0] is dtype:
                return self
            # Transformers' loss casts to float32, even from float64. Other casts to narrower dtypes are rare.
            if args[0] is not torch.float32 and torch.promote_types(dtype, args[0]) is not args[0]:
                return None
            dtype = args[0]
        elif function in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape):
            function, is_view = torch.Tensor.view, True
            args = (args[0],) if len(args) == 1 else (args,)
            shape = _shape_of_view(self.shape, args[0])
            if shape is None:
                return None
        elif function in PRODUCTS:
            function = PRODUCTS[function]
            if len(args) != 1 or type(args[0]) not in (int, float):
                return None
            if args[0] == 0 or not math.isfinite(args[0]):
                return None
        elif function in (torch.tanh, torch.Tensor.tanh) and not args:
            function = torch.tanh
        else:
            return None
        return _Step.apply(self, (function, args), shape, dtype, is_view)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in KNOWN_WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.register_hook:
            return _register_hook(*args, **kwargs)
        if func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
            return _differentiate(func, *args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first._real is None:
            if func is F.cross_entropy:
                result = first.cross_entropy(*args[1:], **kwargs)
            else:
                result = None if kwargs else first._remember(func, args[1:])
            if result is not None:
                return result
        return func(*tree_map(_real_of, args), **tree_map(_real_of, kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Runs only for code that bypasses Python's torch functions, such as collectives and other libraries' kernels.
        return func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs or {}))


class _Source:
    """Gives the backward of logits that were not computed the ``HeadOutput`` of their head.

    The graph of a loss that was computed from the hidden states contains these nodes too. They must not keep the hidden states in
    memory unless the logits were computed, because only then can they get a gradient.
    """

    output: HeadOutput | None = None


class _Watch:
    """Tracks whether the gradient of some logits was requested, or that of the logits from which they were made.

    Attributes:
        parent: The ``_Watch`` of the logits from which they were made.
        logits: A weak reference to the logits.
        hooks: The hooks registered on the logits by id; ``None`` before the first.
        signals: The ids of hooks that ignore the gradient and only run code when backward begins.
        captures: The number of running calls of ``autograd.grad`` or ``backward`` with these logits as inputs.
    """

    def __init__(self, logits: LazyLogits, parent: _Watch | None):
        self.parent = parent
        self.logits = weakref.ref(logits)
        self.hooks: Any = None
        self.signals: set[int] = set()
        self.captures = 0

    def is_on(self) -> bool:
        """Whether the gradient of these logits was requested, or of any logits from which they were made."""
        logits = self.logits()
        retained = logits is not None and logits.retains_grad
        if retained or self.captures or any(key not in self.signals for key in self.hooks or ()):
            return True
        return self.parent is not None and self.parent.is_on()


class _FromHead(torch.autograd.Function):
    """From hidden states to logits that are not computed; its backward is that of the head."""

    @staticmethod
    def forward(ctx: Any, output: HeadOutput, *tensors: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source = _Source()
        return _new(output, (), output.shape, output.dtype, ctx.source, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if grad is None:
            return None, *[None] * len(needed)
        output = ctx.source.output
        with torch.enable_grad():
            logits = output.evaluate()
        inputs = [t for t, need in zip(output.tensors, needed, strict=True) if need]
        grads = torch.autograd.grad(logits, inputs, grad, create_graph=torch.is_grad_enabled())
        found = iter(grads)
        return None, *(next(found) if need else None for need in needed)


class _Step(torch.autograd.Function):
    """One recorded step from logits that are not computed to others."""

    @staticmethod
    def forward(
        ctx: Any, logits: LazyLogits, step: Step, shape: Any, dtype: torch.dtype, is_view: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source, ctx.steps = logits._source, (*logits._steps, step)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        made = _new(logits._output, ctx.steps, shape, dtype, ctx.source, logits._watch)
        made._viewed = logits if is_view else None
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is not None:
            function, args = ctx.steps[-1]
            if function is torch.Tensor.to:
                grad = grad.to(ctx.dtype)
            elif function is torch.Tensor.view:
                grad = grad.reshape(ctx.shape)
            elif function is torch.tanh:
                grad = torch.ops.aten.tanh_backward(grad, ctx.source.output.evaluate(ctx.steps))
            else:
                grad = function(grad, *args)
        return grad, None, None, None, None


class _Real(torch.autograd.Function):
    """From ``LazyLogits`` to ordinary logits. Gradients pass unchanged, so that hooks on the ``LazyLogits`` get them."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return logits._values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Loss(torch.autograd.Function):
    """A loss computed from the hidden states. It has no gradient for the logits and raises an error if one was requested."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: LazyLogits) -> Tensor:
        ctx.watch = logits._watch
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.watch.is_on():
            raise RuntimeError(
                "the gradient of the logits was requested (retain_grad, register_hook, or logits as inputs of autograd.grad or "
                "backward), but this loss was computed from the hidden states without the logits, so they have none. "
                "Use wrap(model, logit_free=False), or compute the loss from output.logits"
            )
        return grad, None


def _new(
    output: HeadOutput,
    steps: tuple[Step, ...],
    shape: Any,
    dtype: torch.dtype,
    source: _Source,
    watch: _Watch | None,
) -> LazyLogits:
    logits: Any = torch.Tensor._make_wrapper_subclass(
        LazyLogits, shape, dtype=dtype, device=output.hidden.device
    )
    logits._output, logits._steps, logits._source = output, steps, source
    logits._watch, logits._viewed, logits._real = _Watch(logits, watch), None, None
    return logits


def _shape_of_view(shape: torch.Size, wanted: Any) -> tuple[int, ...] | None:
    """The shape that ``view(wanted)`` gives, or ``None`` if it does not keep the last axis."""
    if not isinstance(wanted, (tuple, list)) or not all(type(size) is int for size in wanted):
        return None
    known = math.prod(size for size in wanted if size != -1)
    if not wanted or wanted[-1] not in (-1, shape[-1]) or wanted.count(-1) > 1 or not known:
        return None
    found = tuple(math.prod(shape) // known if size == -1 else size for size in wanted)
    return found if found[-1] == shape[-1] and math.prod(found) == math.prod(shape) else None


def _register_hook(logits: LazyLogits, hook: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        handle = torch.Tensor.register_hook(logits, hook)
        logits._watch.hooks = logits._backward_hooks
    while isinstance(hook, functools.partial):
        hook = hook.func
    # FSDP registers a hook on every output of a module to gather the weights before backward. The hook ignores the gradient.
    if (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
        logits._watch.signals.add(handle.id)
    return handle


def _differentiate(function: Any, tensors: Any, *inputs: Any, **kwargs: Any) -> Any:
    """``autograd.grad``, ``autograd.backward`` or ``Tensor.backward`` with logits among the tensors or the inputs."""
    wanted = inputs, kwargs.pop("inputs", None)
    kwargs = tree_map(_real_of, kwargs)
    if wanted[1] is not None:
        kwargs["inputs"] = wanted[1]
    with _captured(wanted):
        return function(tree_map(_real_of, tensors), *inputs, **kwargs)


@contextlib.contextmanager
def _captured(inputs: Any) -> Iterator[None]:
    watches = [t._watch for t in tree_leaves(inputs) if isinstance(t, LazyLogits)]
    for watch in watches:
        watch.captures += 1
    try:
        # Otherwise torch would call LazyLogits.__torch_function__ again.
        with torch._C.DisableTorchFunctionSubclass():
            yield
    finally:
        for watch in watches:
            watch.captures -= 1


def _real_of(value: Any) -> Any:
    return value.real() if isinstance(value, LazyLogits) else value


def _values_of(value: Any) -> Any:
    return value._values() if isinstance(value, LazyLogits) else value
