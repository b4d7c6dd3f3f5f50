"""Element-wise passes of the CPU path as one pass each, in C, built once with the machine's own compiler.

Where torch needs one pass over memory (and one fresh buffer) for every elementary operation, each of these reads its
inputs once and writes its outputs once. They are taken for contiguous float32 tensors on the CPU; everything else, and
every machine without a C compiler, runs the torch ops they stand in for.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from peftkit_kernels.native import build

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
GATES = ("silu", "gelu_tanh")
"""The activations there are native passes for, in the order of the source. The exact GELU stays with torch: its erf has no
vector form in C, and one element at a time it is fifty times slower than torch's."""

_SIGNATURES = {
    "pk_gate": (*[_POINTER] * 3, _INT64, _INT, _INT),
    "pk_gate_backward": (*[_POINTER] * 5, _INT64, _INT, _INT),
    "pk_rms_norm": (*[_POINTER] * 4, _INT64, _INT64, _FLOAT, _FLOAT, _INT),
    "pk_rms_norm_backward": (*[_POINTER] * 5, _INT64, _INT64, _FLOAT, _INT),
    "pk_cross_entropy": (*[_POINTER] * 4, _INT64, _INT64, _FLOAT, _FLOAT, _FLOAT, _INT),
    "pk_dropout": (*[_POINTER] * 2, _INT64, _INT64, _INT64, _FLOAT, _INT64, _INT),
}


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors can go through the native passes: contiguous float32 on the CPU, and a library to call.

    Autograd does not see the passes, so tensors it is recording are left to torch, and so are subclasses without memory.
    """
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        if (recording and tensor.requires_grad) or type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
    return not torch.compiler.is_compiling() and _library() is not None


def obstacle() -> str | None:
    """Why the native passes cannot run on this machine, as a sentence, or ``None``."""
    library, reason = build.load()
    return None if library is not None else reason


def gate(e: Tensor, g: Tensor, act: str) -> Tensor:
    """``act(e) ∘ g`` for an ``act`` of ``GATES``."""
    h = torch.empty_like(e)
    _call("pk_gate", e, g, h, e.numel(), GATES.index(act))
    return h


def gate_backward(dh: Tensor, e: Tensor, g: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(de, dg, h)``; ``dg`` is written over ``dh``."""
    de, h = torch.empty_like(e), torch.empty_like(e)
    _call("pk_gate_backward", dh, e, g, de, h, e.numel(), GATES.index(act))
    return de, dh, h


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """``(y, rstd)`` for ``x [..., K]``; ``rstd`` is ``[..., 1]``."""
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    _call("pk_rms_norm", x, weight, y, rstd, rstd.numel(), x.shape[-1], eps, offset)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """``dx`` of ``rms_norm``."""
    dx = torch.empty_like(x)
    _call("pk_rms_norm_backward", dy, x, weight, rstd, dx, rstd.numel(), x.shape[-1], offset)
    return dx


def cross_entropy_(
    z: Tensor, target: Tensor, smoothing: float, z_loss: float, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row of ``z [M, V]``, which becomes the gradient times ``grad_scale``.

    Args:
        z: Logits, overwritten.
        target: ``Int64[M]``; a value outside [0, V) gives loss 0 and gradient 0.
        smoothing: Label smoothing in [0, 1).
        z_loss: Weight of the squared log-sum-exp.
        grad_scale: Factor on the gradient.
    """
    loss, lse = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    _call("pk_cross_entropy", z, target, loss, lse, z.shape[0], z.shape[1], smoothing, z_loss, grad_scale)
    return loss, lse


def dropout(x: Tensor, threshold: int, scale: float, seed: int) -> Tensor:
    """``mask ∘ x · scale`` by the rule of ``peftkit_kernels.dropout`` for ``x [M, K]``."""
    y = torch.empty_like(x)
    _call("pk_dropout", x, y, x.shape[0], x.shape[1], threshold, scale, seed)
    return y


def _call(name: str, *arguments: Tensor | float) -> None:
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(_library(), name)(*pointers, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library, _ = build.load()
    if library is None:
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
