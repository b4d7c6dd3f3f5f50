"""A Triton interpreter that computes the values of a GPU, for machines without a GPU.

Stock Triton (``TRITON_INTERPRET=1``) stores bfloat16 as raw uint16 and computes with the bit patterns: ``tl.dot`` of two
bfloat16 tiles gives values around 1e10, ``+ - * <`` are integer operations, and float32 to bfloat16 truncates. It ignores
``input_precision`` (a GPU's default for float32 is TF32). None of this raises an error, so a correct kernel can look wrong and
a wrong one correct. Inside ``faithful()``:

* bfloat16 operands of ``tl.dot`` are widened exactly, and every other bfloat16 operation is done in float32 and rounded to
  nearest even. With ``strict_bf16`` arithmetic on bfloat16 tiles raises an error, because kernels must widen them first.
* A float32 ``tl.dot`` with ``input_precision="tf32"`` truncates its operands to 10 mantissa bits.
* A signed int32 sum or product beyond ``int32_limit`` raises an error. With a limit of 4096, small tensors find offsets that
  would overflow on large ones: if M, K < 4096 < M K, any ``row * stride`` in int32 exceeds the limit.
* ``order`` runs the programs of a launch reversed or shuffled, to find a kernel that depends on their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl

from lab.patching import Builder, Handle, check_interpreter


@dataclass(frozen=True, slots=True)
class Options:
    """The checks and imitations of ``faithful``.

    Attributes:
        strict_bf16: Whether arithmetic on bfloat16 tiles raises ``TypeError``.
        tf32: Whether ``input_precision="tf32"`` drops the bits that a GPU drops.
        int32_limit: int32 results outside ``[-int32_limit, int32_limit)`` raise ``OverflowError``.
        order: Order of the programs of a launch: ``None`` is row-major, ``"reverse"``, or the seed of a shuffle.
    """

    strict_bf16: bool = True
    tf32: bool = True
    int32_limit: int = 2**31
    order: str | int | None = None


_options: list[Options] = []
_stock: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def faithful(**options: Any) -> Iterator[None]:
    """Repair the interpreter for the launches inside. Options that are not given are those of the enclosing ``faithful``.

    Args:
        options: Fields of ``Options``.

    Raises:
        RuntimeError: Kernels do not run in the interpreter, or the lab does not support this interpreter.
    """
    check_interpreter()
    outermost = not _options
    _options.append(dataclasses.replace(_options[-1] if _options else Options(), **options))
    if outermost:
        _stock.update({name: getattr(Builder, name) for name in _METHODS})
        for name, method in _METHODS.items():
            setattr(Builder, name, method)
    try:
        # a GPU does not warn about infinities and NaN
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            yield
    finally:
        _options.pop()
        if outermost:
            for name, method in _stock.items():
                setattr(Builder, name, method)
            _stock.clear()


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers whose bfloat16 bit patterns are ``bits``."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of ``values`` rounded to nearest even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """The value that a TF32 tensor core reads from a float32 register: Triton does not round, and the hardware drops 13 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> np.ndarray:
    return bfloat16_to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def _bfloat16(data: np.ndarray) -> Any:
    return Handle(float32_to_bfloat16(data), tl.bfloat16)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == target or tl.bfloat16 not in (source, target):
        return _stock["cast_impl"](self, src, dst_type)
    if source == tl.bfloat16:
        wide = Handle(bfloat16_to_float32(src.data), tl.float32)
        return wide if target == tl.float32 else _stock["cast_impl"](self, wide, dst_type)
    wide = src if source == tl.float32 else _stock["cast_impl"](self, src, tl.float32)
    return _bfloat16(wide.data)


def _create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    ends = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 in ends and all(end.primitive_bitwidth > 8 for end in ends):
        return _cast_impl(self, src, dst_type)
    return _stock["create_fp_to_fp"](self, src, dst_type, rounding_mode)


_WRAPPING = (np.add, np.subtract, np.multiply)
_ARITHMETIC = (*_WRAPPING, np.divide)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    options = _options[-1]
    if op in _WRAPPING and lhs.data.dtype == np.int32:
        wide, limit = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64)), options.int32_limit
        if ((wide >= limit) | (wide < -limit)).any():
            raise OverflowError(f"int32 arithmetic exceeds ±{limit}; widen the offset to int64")
    if not _is_bfloat16(lhs) or op in _BITWISE:
        return _stock["binary_op"](self, lhs, rhs, op)
    if options.strict_bf16 and op in _ARITHMETIC:
        raise TypeError(f"{op.__name__} of bfloat16 tiles; widen them to float32 first")
    result = op(_wide(lhs), _wide(rhs))
    return Handle(result, tl.int1) if result.dtype == np.bool_ else _bfloat16(result)


def _unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
    if _is_bfloat16(arg):
        return _bfloat16(op(_wide(arg)))
    return _stock["unary_op"](self, arg, op)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if _is_bfloat16(z):
        return _bfloat16((_wide(x).astype(np.float64) * _wide(y) + _wide(z)).astype(np.float32))
    return _stock["create_fma"](self, x, y, z)


def _create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
    if not _is_bfloat16(arg):
        return _stock["create_clampf"](self, arg, lo, hi, propagate_nans)
    wide = (Handle(_wide(t), tl.float32) for t in (arg, lo, hi))
    return _bfloat16(_stock["create_clampf"](self, *wide, propagate_nans).data)


def _create_dot(
    self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
) -> Any:
    kind = a.dtype.scalar
    if kind in (tl.bfloat16, tl.float16):  # float16 for speed: numpy has no fast product for it
        a, b = (Handle(_wide(t).astype(np.float32), tl.float32) for t in (a, b))
    elif kind == tl.float32 and _options[-1].tf32 and input_precision.name == "TF32":
        a, b = (Handle(truncate_to_tf32(t.data), tl.float32) for t in (a, b))
    return _stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)


def _set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
    _stock["set_grid_dim"](self, nx, ny, nz)
    order = _options[-1].order
    if order is None:
        self.permutation = None
        return
    programs = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
    run = programs[::-1]
    if order != "reverse":
        run = random.Random(order).sample(programs, len(programs))
    self.permutation = dict(zip(programs, run, strict=True))


def _set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
    program = (x, y, z) if self.permutation is None else self.permutation[x, y, z]
    _stock["set_grid_idx"](self, *program)


_METHODS = {
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _create_fp_to_fp,
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "create_fma": _create_fma,
    "create_clampf": _create_clampf,
    "create_dot": _create_dot,
    "set_grid_dim": _set_grid_dim,
    "set_grid_idx": _set_grid_idx,
}
