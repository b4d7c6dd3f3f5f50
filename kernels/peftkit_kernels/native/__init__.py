"""Element-wise operations and attention for the CPU in C, built once with the machine's own compiler.

torch needs one pass over memory, and one new buffer, for every elementary operation. Each function here reads its inputs
once and writes its outputs once. They run on contiguous float32 tensors on the CPU. For other tensors, and on a machine
without a C compiler, torch operations run instead.

Native code is called past torch: no mode, tracer or transformation sees the call (``peftkit_kernels.modes``). A caller
checks ``supports`` first. Every size goes to C as a Python int or raises ``ctypes.ArgumentError``, and every tensor must have
memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.modes import hides_native_calls
from peftkit_kernels.native import build

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
GATES = ("silu", "gelu_tanh")
"""The activations there are native passes for, in the order of the source. The exact GELU stays with torch: its erf has no
vector form in C, and one element at a time it is fifty times slower than torch's."""

_SUM_ROWS = 64
"""Rows whose sums ``dora.c`` leaves as one partial sum."""

MAX_RANK = 256
"""Of ``updated_norm``: factors it keeps on the stack."""

_SIGNATURES = {
    "pk_gate": (*[_POINTER] * 3, _INT64, _INT, _INT),
    "pk_gate_backward": (*[_POINTER] * 5, _INT64, _INT, _INT),
    "pk_rms_norm": (*[_POINTER] * 4, _INT64, _INT64, _FLOAT, _FLOAT, _INT),
    "pk_rms_norm_backward": (*[_POINTER] * 5, _INT64, _INT64, _FLOAT, _INT),
    "pk_layer_norm": (*[_POINTER] * 6, _INT64, _INT64, _FLOAT, _INT),
    "pk_layer_norm_backward": (*[_POINTER] * 6, _INT64, _INT64, _INT),
    "pk_updated_norm": (*[_POINTER] * 4, *[_INT64] * 3, _FLOAT, _INT),
    "pk_scale_backward": (*[_POINTER] * 5, _INT64, _INT64, _INT),
    "pk_scaled_gate": (*[_POINTER] * 7, _INT64, _INT64, _INT, _INT),
    "pk_scaled_gate_backward": (*[_POINTER] * 10, _INT64, _INT64, _INT, _INT),
    "pk_cross_entropy": (*[_POINTER] * 4, _INT64, _INT64, _FLOAT, _FLOAT, _FLOAT, _INT),
    "pk_attention": (_POINTER,) * 8,
    "pk_attention_backward": (_POINTER,) * 15,
    "pk_dropout": (*[_POINTER] * 2, _INT64, _INT64, _INT64, _FLOAT, _INT64, _INT),
    "pk_quantize_rows": (*[_POINTER] * 4, _INT64, _INT64, _INT),
    "pk_int8_epilogue": (*[_POINTER] * 7, *[_INT64] * 3, _INT),
    "pk_nf4": (*[_POINTER] * 4, *[_INT64] * 5, _INT),
}
SYMBOLS = tuple(_SIGNATURES)
"""The functions that a library must have."""

_FALLIBLE = ("pk_attention", "pk_attention_backward")


class _Tensor4(ctypes.Structure):
    """A ``[batch, head, position, feature]`` tensor whose features are contiguous."""

    _fields_ = (("data", _POINTER), ("batch", _INT64), ("head", _INT64), ("position", _INT64))


class _Problem(ctypes.Structure):
    """The sizes and switches of one attention call, as ``attention.c`` reads them."""

    _fields_ = (
        *(
            (name, _INT64)
            for name in ("batches", "heads", "key_heads", "queries", "keys", "features")
        ),
        ("scale", _FLOAT),
        ("causal", _INT),
        ("threads", _INT),
        ("mask", _POINTER),
        ("mask_batch", _INT64),
        ("mask_query", _INT64),
        ("prefix", _INT64),
        ("gate", _POINTER),
    )


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
    return not hides_native_calls() and _library() is not None


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


def gate(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) ∘ up`` for an ``act`` of ``GATES``."""
    h = torch.empty_like(gate)
    _call("pk_gate", (gate, up, h), gate.numel(), GATES.index(act))
    return h


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(d_gate, d_up, h)``; ``d_up`` is written into ``dh``."""
    d_gate, h = torch.empty_like(gate), torch.empty_like(gate)
    _call("pk_gate_backward", (dh, gate, up, d_gate, h), gate.numel(), GATES.index(act))
    return d_gate, dh, h


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """``(y, rstd)`` for ``x [..., K]``; ``rstd`` is ``[..., 1]``."""
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    _call("pk_rms_norm", (x, weight, y, rstd), rstd.numel(), x.shape[-1], eps, offset)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """``dx`` of ``rms_norm``."""
    dx = torch.empty_like(x)
    _call("pk_rms_norm_backward", (dy, x, weight, rstd, dx), rstd.numel(), x.shape[-1], offset)
    return dx


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)`` for ``x [..., K]``; the last two are ``[..., 1]``."""
    y, (mean, rstd) = torch.empty_like(x), x.new_empty(2, *x.shape[:-1], 1)
    _call("pk_layer_norm", (x, weight, bias, y, mean, rstd), rstd.numel(), x.shape[-1], eps)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """``dx`` of ``layer_norm``."""
    dx = torch.empty_like(x)
    _call("pk_layer_norm_backward", (dy, x, weight, mean, rstd, dx), rstd.numel(), x.shape[-1])
    return dx


def updated_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``|W + scale · B A|`` of every row in one read of ``W [N, K]``; the rank is at most ``MAX_RANK``."""
    norm = weight.new_empty(weight.shape[0])
    _call("pk_updated_norm", (weight, A, B, norm), *weight.shape, A.shape[0], scale)
    return norm


def scaled_gate(
    zs: Sequence[Tensor], gs: Sequence[Tensor], biases: Sequence[Tensor], act: str
) -> Tensor:
    """``act(z0 ∘ g0 + b0) ∘ (z1 ∘ g1 + b1)`` for ``zs [M, F]`` and the others ``[F]``; an ``act`` of ``GATES``."""
    h = torch.empty_like(zs[0])
    _call("pk_scaled_gate", (*zs, *gs, *biases, h), *h.shape, GATES.index(act))
    return h


def scaled_gate_backward(
    dh: Tensor, zs: Sequence[Tensor], gs: Sequence[Tensor], biases: Sequence[Tensor], act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dz0, dz1, sums)`` of ``scaled_gate``.

    Returns:
        The gradients by the two ``zs``, and ``[4, F]``: summed over the rows, ``d_gate ∘ z0``, ``d_up ∘ z1``, ``d_gate`` and ``d_up``,
        where ``d_gate`` and ``d_up`` are the gradients by the two scaled values.
    """
    d_gate, d_up = torch.empty_like(dh), torch.empty_like(dh)
    partial = dh.new_empty(-(-dh.shape[0] // _SUM_ROWS), 4, dh.shape[1])
    _call(
        "pk_scaled_gate_backward",
        (dh, *zs, *gs, *biases, d_gate, d_up, partial),
        *dh.shape,
        GATES.index(act),
    )
    return d_gate, d_up, partial.sum(0)


def scale_backward(dy: Tensor, z: Tensor, g: Tensor, dz: Tensor) -> Tensor:
    """``dz = dy ∘ g`` for ``dy [M, N]`` and ``g [N]``, written; returns ``Σ dy ∘ z`` over the rows, ``[N]``."""
    partial = dy.new_empty(-(-dy.shape[0] // _SUM_ROWS), dy.shape[1])
    _call("pk_scale_backward", (dy, z, g, dz, partial), *dy.shape)
    return partial.sum(0)


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
    _call("pk_cross_entropy", (z, target, loss, lse), *z.shape, smoothing, z_loss, grad_scale)
    return loss, lse


def dropout(x: Tensor, threshold: int, scale: float, seed: int) -> Tensor:
    """``mask ∘ x · scale`` by the rule of ``peftkit_kernels.dropout`` for ``x [M, K]``."""
    y = torch.empty_like(x)
    _call("pk_dropout", (x, y), *x.shape, threshold, scale, seed)
    return y


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    row_scale: Tensor | None,
    out: Tensor,
    blocksize: int,
    first_row: int,
) -> None:
    """Rows ``first_row ...`` of an NF4 weight of ``out``'s width, as ``peftkit_kernels.nf4`` defines it, into ``out``.

    Args:
        packed: ``UInt8``, contiguous: two codes a byte, for the whole weight.
        absmax: ``Float32[blocks]``, contiguous.
        row_scale: ``Float32[N]``, contiguous, or ``None``.
        out: ``Float32[rows, K]`` whose rows are contiguous.
        blocksize: Elements that share one ``absmax``.
        first_row: Row of the weight that ``out`` starts at.
    """
    sizes = *out.shape, out.stride(0), blocksize, first_row
    _call("pk_nf4", (packed, absmax, row_scale, out), *sizes)


def quantize_rows(x: Tensor, column_scale: Tensor | None, codes: Tensor) -> Tensor:
    """``codes = round(x ∘ column_scale · 127 / absmax)`` by rows; returns ``absmax``.

    Args:
        x: ``[M, K]``.
        column_scale: ``Float32[K]`` or ``None``.
        codes: ``Int8[M, K]``, contiguous, written.

    Returns:
        ``Float32[M]``, the largest magnitude of each row of ``x ∘ column_scale``.
    """
    absmax = x.new_empty(x.shape[0])
    _call("pk_quantize_rows", (x, column_scale, codes, absmax), *x.shape)
    return absmax


def int8_epilogue(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
) -> Tensor:
    """``acc ∘ row_scale columnwise ∘ column_scale rowwise + bias + s t`` in one pass.

    Args:
        acc: ``Int32[M, N]``, contiguous.
        row_scale: ``Float32[M]``.
        column_scale: ``Float32[N]`` or ``None``.
        bias: ``Float32[N]`` or ``None``.
        s: ``Float32[M, R]``, contiguous, or ``None``.
        t: ``Float32[R, N]``, contiguous, or ``None``.
    """
    y = row_scale.new_empty(acc.shape)
    rank = 0 if s is None else s.shape[1]
    tensors = acc, row_scale, column_scale, bias, s, t, y
    _call("pk_int8_epilogue", tensors, *acc.shape, rank)
    return y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q kᵀ) v`` and the log-sum-exp of every row of scores.

    Args:
        q: ``[B, H, S, D]``, features contiguous, ``D`` a multiple of 32.
        k: ``[B, H_kv, T, D]``; ``H`` is a multiple of ``H_kv``.
        v: As ``k``.
        scale: Factor on the scores.
        causal: Query ``i`` sees keys up to ``i``.
        mask: ``Bool[B, 1, S, T]``, true where a query may see a key; keys contiguous.
        prefix: Keys and values ``[H_kv, P, D]`` that every query sees besides, features contiguous.
        gate: ``Float32[H]``, contiguous: the prefix has a softmax of its own and this share in the output.

    Returns:
        ``[B, S, H, D]``, contiguous (a query that sees nothing gives 0), and ``[B, H, S]``; with a gate ``[2, B, H, S]``, that of
        the keys and that of the prefix.
    """
    B, H, S, D = q.shape
    out, lse = q.new_empty(B, S, H, D), q.new_empty(*(() if gate is None else (2,)), B, H, S)
    problem = _problem(q, k, scale, causal, mask, prefix, gate)
    tensors = [_tensor4(t) for t in (q, k, v, *(prefix or (None, None)), out.transpose(1, 2))]
    _run("pk_attention", problem, *tensors, _address(lse))
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``(dq, dk, dv)`` of ``attention``, in the layouts of ``q``, ``k`` and ``v``; ``dout`` and ``out`` are ``[B, S, H, D]``.

    With a prefix also its two gradients, and with a gate that of it, a part for each sequence: ``[B, H_kv, P, D]`` and ``[B, H]``.
    """
    lse = (
        lse.contiguous()
    )  # torch's own flash attention, which may have computed it, has another layout
    grads = [torch.empty_like(t) for t in (q, k, v)]
    grads += [t.new_empty(q.shape[0], *t.shape) for t in prefix or ()]
    dgate = [] if gate is None else [gate.new_empty(q.shape[:2])]
    problem = _problem(q, k, scale, causal, mask, prefix, gate)
    own = prefix or (None, None)
    before = [_tensor4(t) for t in (dout.transpose(1, 2), q, k, v, *own, out.transpose(1, 2))]
    after = [_tensor4(t) for t in (*grads, None, None)[:5]]
    pointer = _address(dgate[0]) if dgate else None
    _run("pk_attention_backward", problem, *before, _address(lse), *after, pointer)
    return *grads, *dgate


def _tensor4(t: Tensor | None) -> _Tensor4 | None:
    """A tensor as ``attention.c`` reads it; one of three axes is the same for every batch."""
    if t is None:
        return None
    batch, head, position = t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])
    return _Tensor4(_address(t), batch, head, position)


def _problem(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    gate: Tensor | None,
) -> _Problem:
    B, H, S, D = q.shape
    strides = (None, 0, 0) if mask is None else (_address(mask), mask.stride(0), mask.stride(2))
    before = 0 if prefix is None else prefix[0].shape[1]
    return _Problem(
        *(B, H, k.shape[1], S, k.shape[2], D, scale, causal, torch.get_num_threads()),
        *(*strides, before, None if gate is None else _address(gate)),
    )


def _run(name: str, *arguments: Any) -> None:
    by_address = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    if getattr(_library(), name)(*by_address):
        raise MemoryError(f"{name}: no memory for its work space (about 100 KiB a thread)")


def _call(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a function whose arguments are the addresses of ``tensors``, then ``numbers``, then the number of threads."""
    pointers = [None if t is None else _address(t) for t in tensors]
    getattr(_library(), name)(*pointers, *numbers, torch.get_num_threads())


def _address(t: Tensor) -> int:
    """Where the values of ``t`` are in memory.

    Raises:
        ValueError: ``t`` has no memory, as on the meta device or in ``FakeTensorMode``.
    """
    address = t.data_ptr()
    if not address and t.numel():
        raise ValueError(
            f"a {type(t).__name__} of shape {tuple(t.shape)} on {t.device} has no values in memory, and native code needs "
            "them; use backend='reference'"
        )
    return address


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build.load(SYMBOLS).library
    if library is None:
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _INT if name in _FALLIBLE else None
    return library
