"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, without_autocast
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.ops.prefix_attention import schedule
from peftkit_kernels.ops.prefix_attention.flash import Pass
from peftkit_kernels.ops.prefix_attention.reference import prefix_attention_reference


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention with learned keys and values, which every query sees, before the other keys and values.

    It computes ``softmax(scale q [prefix_k; k]ᵀ) [prefix_v; v]`` in two passes that read the keys in place: the cache is not
    copied, and keys of grouped-query heads are not repeated. With a gate each part has its own softmax and
    ``out = own + gate · prefix``, so that a gate of zero changes nothing. Kept for backward: the arguments, the output and one
    number for each query and head. With a gate: two numbers and, outside of the native pass, both parts of the output.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, H_kv, T, D]``; ``H`` is a multiple of ``H_kv``.
        v: As ``k``.
        prefix_k: ``[H_kv, P, D]``. A float32 prefix with a 16-bit ``q`` is cast; its gradient stays float32.
        prefix_v: As ``prefix_k``.
        scale: Factor on the scores, usually ``D ** -0.5``.
        causal: Query ``i`` sees keys up to ``i``; needs ``S == T``.
        mask: ``Bool[B, 1, S, T]``, true where a query may see a key.
        gate: ``[H]``, for each head a factor on the output of the prefix, or ``None``.
        backend: ``"auto"``, ``"triton"`` (on a GPU in 16 bits, without a mask, head sizes that are multiples of 8),
            ``"torch"`` (on the CPU) or ``"reference"``.

    Returns:
        ``[B, S, H, D]`` in the dtype of ``q``, or of autocast if it is on.

    Raises:
        ValueError: Shapes do not fit, or the backend cannot run.

    Source: Li and Liang, 2021, arXiv:2101.00190; gate: Zhang et al., 2023, arXiv:2303.16199, section 3.2.
    """
    tensors = q, k, v, prefix_k, prefix_v, gate, mask
    call = schedule.Prefixed(*tensors, float(scale), bool(causal))
    if backend == "auto" and replays(q):
        out = schedule.prefix_attention.again(call)
        if out is not None:
            return out
    dtype = autocast_dtype(q)
    if dtype is not None:
        with without_autocast(q):
            return prefix_attention(
                *(q.to(dtype), k.to(dtype), v.to(dtype), prefix_k, prefix_v, scale),
                **{"causal": causal, "mask": mask, "gate": gate, "backend": backend},
            )
    _check(q, k, v, prefix_k, prefix_v, causal, mask, gate)
    chosen = choose_backend("prefix_attention", backend, *tensors, has_dot=False)
    obstacle = _obstacle(chosen, q, k, prefix_k) or Pass(scale, causal, mask).obstacle(q)
    if obstacle and backend == chosen != "reference":
        raise ValueError(f"backend={backend!r}: {obstacle}; use backend='auto'")
    if obstacle or chosen == "reference":
        return prefix_attention_reference(
            q, k, v, prefix_k, prefix_v, scale, causal=causal, mask=mask, gate=gate
        )
    return schedule.prefix_attention(chosen, call)


def _obstacle(chosen: str, q: Tensor, k: Tensor, prefix_k: Tensor) -> str | None:
    if chosen == "torch" and q.device.type != "cpu":
        return f"the torch backend merges the parts on the CPU only, and q is on {q.device}"
    for name, tensor in (("q", q), ("k", k), ("prefix_k", prefix_k)):
        if tensor.numel() == 0:
            return f"{name} is empty"
    return None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    mask: Tensor | None,
    gate: Tensor | None,
) -> None:
    B, H, S, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; q must be [B, H, S, D], and k and v "
            "must be [B, H_kv, T, D] with H a multiple of H_kv"
        )
    if (
        prefix_k.dim() != 3
        or prefix_k.shape != prefix_v.shape
        or prefix_k.shape[::2] != (k.shape[1], D)
    ):
        raise ValueError(
            f"prefix_k {tuple(prefix_k.shape)} and prefix_v {tuple(prefix_v.shape)} do not fit k {tuple(k.shape)}; "
            f"they must be [{k.shape[1]}, P, {D}]"
        )
    if causal and k.shape[2] != S:
        raise ValueError(
            f"causal=True with {S} queries and {k.shape[2]} keys is ambiguous; pass a mask instead"
        )
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != (B, 1, S, k.shape[2])):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {(B, 1, S, k.shape[2])}"
        )
    if gate is not None and gate.shape != (H,):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; it must be [{H}], one factor for each head"
        )
