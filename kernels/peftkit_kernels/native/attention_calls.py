"""Attention in C: the arguments of ``attention.c`` and its two calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from peftkit_kernels.native.library import FLOAT, INT, INT64, POINTER, address, run


class _Tensor4(ctypes.Structure):
    """A ``[batch, head, position, feature]`` tensor whose features are contiguous."""

    _fields_ = (("data", POINTER), ("batch", INT64), ("head", INT64), ("position", INT64))


class _Problem(ctypes.Structure):
    """The sizes and switches of one attention call, as ``attention.c`` reads them."""

    _fields_ = (
        *(
            (name, INT64)
            for name in ("batches", "heads", "key_heads", "queries", "keys", "features")
        ),
        ("scale", FLOAT),
        ("causal", INT),
        ("threads", INT),
        ("mask", POINTER),
        ("mask_batch", INT64),
        ("mask_query", INT64),
        ("prefix", INT64),
        ("gate", POINTER),
    )


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
        prefix: More keys and values ``[H_kv, P, D]``, which every query sees; features contiguous.
        gate: ``Float32[H]``, contiguous: the prefix has a softmax of its own and this share in the output.

    Returns:
        ``[B, S, H, D]``, contiguous (a query that sees nothing gives 0), and ``[B, H, S]``; with a gate ``[2, B, H, S]``, that of
        the keys and that of the prefix.
    """
    B, H, S, D = q.shape
    out, lse = q.new_empty(B, S, H, D), q.new_empty(*(() if gate is None else (2,)), B, H, S)
    problem = _problem(q, k, scale, causal, mask, prefix, gate)
    tensors = [_tensor4(t) for t in (q, k, v, *(prefix or (None, None)), out.transpose(1, 2))]
    run("pk_attention", problem, *tensors, address(lse))
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
    pointer = address(dgate[0]) if dgate else None
    run("pk_attention_backward", problem, *before, address(lse), *after, pointer)
    return *grads, *dgate


def _tensor4(t: Tensor | None) -> _Tensor4 | None:
    """A tensor as ``attention.c`` reads it; one of three axes is the same for every batch."""
    if t is None:
        return None
    batch, head, position = t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])
    return _Tensor4(address(t), batch, head, position)


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
    strides = (None, 0, 0) if mask is None else (address(mask), mask.stride(0), mask.stride(2))
    before = 0 if prefix is None else prefix[0].shape[1]
    return _Problem(
        *(B, H, k.shape[1], S, k.shape[2], D, scale, causal, torch.get_num_threads()),
        *(*strides, before, None if gate is None else address(gate)),
    )
