"""The results of operations that are not computed and that torch's meta rules do not give: those that decide something, and others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from peftkit.planning.tensors import Sizes, contiguous, has_no_values, make

aten = torch.ops.aten

MOST_INTEGERS = 2**22
"""Elements of the largest tensor of integers or truth values that is computed."""


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _number(mode: Any, func: Any, t: Tensor) -> Any:
    """The single number of ``t``: no test finds anything, and numbers are 1."""
    if t.dtype is torch.bool:
        return False
    return 1.0 if t.dtype.is_floating_point else 1


def _truth(value: bool) -> Callable[..., Tensor]:
    def of(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        (sizes,) = tree_leaves(mode.sizes(func, args, kwargs))
        like = next(tensors_in(args))
        return torch.full(sizes.shape, value, dtype=sizes.dtype, device=like.device)

    return of


def _equal(mode: Any, func: Any, *args: Any) -> bool:
    return True


def _top(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest values of each row, at places that are spread evenly."""
    values, places = mode.without_values(func, args, kwargs)
    size = args[0].shape[args[2] if len(args) > 2 else -1]
    if not places.is_meta and places.numel() <= MOST_INTEGERS:
        places = torch.arange(places.numel()).remainder_(size).view(places.shape)
    return values, places


def _nonzero(mode: Any, func: Any, t: Tensor) -> Tensor:
    """The places of all elements."""
    rows, sizes = t.numel(), (t.numel(), max(t.dim(), 1))
    if t.is_meta or rows > MOST_INTEGERS:
        return make(Sizes(sizes, (1, rows), torch.int64, 8 * math.prod(sizes), 0), t.is_meta)
    return torch.ones(t.shape, dtype=torch.bool).nonzero()


def _index(mode: Any, func: Any, t: Tensor, places: Any) -> Any:
    """``t[places]``, where a mask stands for the places at which it is true."""
    found: list[Any] = []
    for place in places:
        if place is None or place.dtype not in (torch.bool, torch.uint8):
            found.append(place)
        elif has_no_values(place):
            found += _nonzero(mode, func, place).unbind(1)
        else:
            found += place.nonzero().unbind(1)
    return mode.without_values(func, (t, found), {})


def _unique(mode: Any, func: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A single value, without the places of others."""
    values, others = contiguous((1,), t.dtype), contiguous((0,), torch.int64)
    return tuple(make(sizes, t.is_meta) for sizes in (values, others, others))


def _selected(mode: Any, func: Any, t: Tensor, mask: Tensor) -> Tensor:
    """``t`` where the mask is true: everywhere. On the CPU torch counts in two tensors of whole numbers."""
    size = math.prod(torch.broadcast_shapes(t.shape, mask.shape))
    if not t.is_meta:
        mode.watch_temporary(2 * 8 * size)
    return make(contiguous((size,), t.dtype), t.is_meta)


def _count(mode: Any, func: Any, t: Tensor, weights: Any = None, minlength: int = 0) -> Tensor:
    """How often each number occurs: all numbers below ``minlength`` occur equally often."""
    return make(contiguous((minlength,), torch.int64), t.is_meta)


def _of_grouped_product(a: Tensor, b: Tensor, offsets: Tensor | None, *_: Any, **__: Any) -> Sizes:
    """Torch's meta rule accepts bfloat16 only, but the CPU multiplies other dtypes too."""
    if a.dim() == 2 and b.dim() == 2:
        assert offsets is not None
        shape = (offsets.shape[0], a.shape[0], b.shape[1])
    elif a.dim() == 2 or b.dim() == 2:
        shape = (a.shape[-2], b.shape[-1])
    else:
        shape = (*a.shape[:2], b.shape[2])
    return contiguous(shape, a.dtype)


def _of_quantised_rows(t: Tensor, threshold: float = 0.0) -> tuple[Any, ...]:
    """Codes and maxima of rows, without outliers."""
    rows = math.prod(t.shape[:-1])
    return contiguous(t.shape, torch.int8), contiguous((rows,), torch.float32), None


def _of_mixed_product(t: Tensor, codes: Tensor, weight: Tensor, *_: Any) -> tuple[Any, ...]:
    """The product, and no outliers."""
    return contiguous((*codes.shape[:-1], weight.shape[0]), t.dtype), None


def _of_ctc(probabilities: Tensor, targets: Tensor, *lengths: Any) -> tuple[Any, ...]:
    """The losses of the rows, and the probabilities of all beginnings of their targets."""
    steps, rows = probabilities.shape[:2]
    longest = int(torch.as_tensor(lengths[1]).max())
    shape = (rows, steps, 2 * longest + 1)
    return contiguous((rows,), probabilities.dtype), contiguous(shape, probabilities.dtype)


def _of_ctc_backward(grad: Tensor, probabilities: Tensor, *_: Any) -> Sizes:
    return contiguous(tuple(probabilities.shape), probabilities.dtype)


SIZES: dict[str, Callable[..., Any]] = {
    "mkldnn._linear_pointwise.binary": lambda x, y, *_: contiguous(y.shape, y.dtype),
    "aten._grouped_mm.default": _of_grouped_product,
    "aten._ctc_loss.default": _of_ctc,
    "aten._ctc_loss.Tensor": _of_ctc,
    "aten._ctc_loss_backward.default": _of_ctc_backward,
    "aten._ctc_loss_backward.Tensor": _of_ctc_backward,
    "bitsandbytes.int8_vectorwise_quant.default": _of_quantised_rows,
    "bitsandbytes.int8_mixed_scaled_mm.default": _of_mixed_product,
}
"""The results of operations for which torch has no rule, or one that refuses what a real run accepts."""


def _run(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of an operation that reads no values."""
    return func(*args, **kwargs)


ASSUMED: dict[Any, Callable[..., Any]] = {
    aten._fused_sdp_choice.default: _run,
    aten._local_scalar_dense.default: _number,
    aten.equal.default: _equal,
    aten.all.default: _truth(True),
    aten.all.dim: _truth(True),
    aten.any.default: _truth(False),
    aten.any.dim: _truth(False),
    aten.topk.default: _top,
    aten.bincount.default: _count,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.masked_select.default: _selected,
    aten.unique_consecutive.default: _unique,
    aten._unique2.default: _unique,
}
"""Operations whose result decides something or has a size that depends on values: functions of the mode, the operation and its arguments."""
