"""The library of native functions: its signatures, whether tensors can go to it, and calls into it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.native import build

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_SIGNATURES = {
    "pk_gate": (*[POINTER] * 3, INT64, INT, INT),
    "pk_gate_backward": (*[POINTER] * 5, INT64, INT, INT),
    "pk_rms_norm": (*[POINTER] * 4, INT64, INT64, FLOAT, FLOAT, INT),
    "pk_rms_norm_backward": (*[POINTER] * 5, INT64, INT64, FLOAT, INT),
    "pk_layer_norm": (*[POINTER] * 6, INT64, INT64, FLOAT, INT),
    "pk_layer_norm_backward": (*[POINTER] * 6, INT64, INT64, INT),
    "pk_updated_norm": (*[POINTER] * 4, *[INT64] * 3, FLOAT, INT),
    "pk_scale_backward": (*[POINTER] * 5, INT64, INT64, INT),
    "pk_scaled_gate": (*[POINTER] * 7, INT64, INT64, INT, INT),
    "pk_scaled_gate_backward": (*[POINTER] * 10, INT64, INT64, INT, INT),
    "pk_cross_entropy": (*[POINTER] * 4, INT64, INT64, FLOAT, FLOAT, FLOAT, INT),
    "pk_attention": (POINTER,) * 8,
    "pk_attention_backward": (POINTER,) * 15,
    "pk_dropout": (*[POINTER] * 2, INT64, INT64, INT64, FLOAT, INT64, INT),
    "pk_quantize_rows": (*[POINTER] * 4, INT64, INT64, INT),
    "pk_int8_epilogue": (*[POINTER] * 7, *[INT64] * 3, INT),
    "pk_int8_linear": (*[POINTER] * 8, *[INT64] * 6, INT, INT),
    "pk_int8_register_bytes": (),
    "pk_nf4": (*[POINTER] * 4, *[INT64] * 5, INT),
    "pk_merge": (*[POINTER] * 6, *[INT64] * 4, FLOAT, INT, INT),
    "pk_round_nf4": (*[POINTER] * 3, INT64, INT64, INT),
}
SYMBOLS = tuple(_SIGNATURES)
"""The functions that a library must have."""

_RETURNING = ("pk_attention", "pk_attention_backward", "pk_int8_linear", "pk_int8_register_bytes")
"""The functions that return a number. For all but the last it is 0, or 1 if they found no memory."""

_skips: ContextVar[bool] = ContextVar("peftkit_native_skipped", default=False)


def supports(*tensors: Tensor) -> bool:
    """Whether the native functions can run on these tensors: contiguous float32 on the CPU, and a library is loaded.

    False for tensors whose gradient autograd would record, because autograd does not see native calls, for subclasses of
    ``Tensor``, and if something else takes part in torch's operations (``hides_native_calls``).
    """
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or not _is_plain(tensor):
            return False
        if recording and tensor.requires_grad:
            return False
    return not hides_native_calls() and loaded() is not None


def _is_plain(tensor: Tensor) -> bool:
    """Whether the memory of ``tensor`` holds its values one after the other, and not, for example, their negatives."""
    return tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()


def obstacle() -> str | None:
    """Why the native functions cannot run on this machine, as a sentence, or ``None``."""
    return build.load(SYMBOLS).obstacle


def description() -> str:
    """Which library is loaded and whether it had to be built again, or why none is; one sentence."""
    found = build.load(SYMBOLS)
    return found.obstacle or f"{found.path}{found.note and f', {found.note}'}"


@contextlib.contextmanager
def skipped() -> Iterator[None]:
    """A context in which every call returns at once and writes nothing, for tensors that have sizes but no memory."""
    token = _skips.set(True)
    try:
        yield
    finally:
        _skips.reset(token)


def run(name: str, *arguments: Any) -> None:
    """Call a function that can fail; structures are passed by address.

    Raises:
        MemoryError: It found no memory for its work space.
    """
    if _skips.get():
        return
    by_address = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    if getattr(loaded(), name)(*by_address):
        raise MemoryError(
            f"{name}: no memory for its work space (about 100 KiB for each thread); free memory or use fewer threads"
        )


def call(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a function whose arguments are the addresses of ``tensors``, then ``numbers``, then the number of threads."""
    if _skips.get():
        return
    pointers = [None if t is None else address(t) for t in tensors]
    getattr(loaded(), name)(*pointers, *numbers, torch.get_num_threads())


def address(t: Tensor) -> int:
    """The address of the values of ``t``.

    Raises:
        ValueError: ``t`` has no memory, as on the meta device or in ``FakeTensorMode``.
    """
    pointer = t.data_ptr()
    if not pointer and t.numel():
        raise ValueError(
            f"a {type(t).__name__} of shape {tuple(t.shape)} on {t.device} has no values in memory, and native code needs "
            "them; use backend='reference'"
        )
    return pointer


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The library with its signatures declared, or ``None`` if there is none."""
    library = build.load(SYMBOLS).library
    if library is None:
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = INT if name in _RETURNING else None
    return library
