"""The public function: checks, and the choice between the native passes and the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import run
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.launch import on_gpu
from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.ops.attention import cudnn
from peftkit_kernels.ops.attention.reference import attention_reference
from peftkit_kernels.ops.attention.torch_impl import Attention

HEAD_SIZE_MULTIPLE = 32
"""The native functions need a head size that is a multiple of 32, which is two vectors of AVX-512."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``softmax(scale q kᵀ) v`` over the keys that a query may see. The scores are never stored.

    Keys and values of grouped-query heads are read in place, never repeated. Kept for backward: q, k, v, the output and
    one number for each query and head.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, H_kv, T, D]``; ``H`` is a multiple of ``H_kv``.
        v: As ``k``.
        scale: Factor on the scores, usually ``D ** -0.5``.
        causal: Query ``i`` sees keys up to ``i``; needs ``S == T``.
        mask: ``Bool[B, 1, S, T]``, true where a query may see a key. The output of a query that sees no key is 0.
        backend: ``"auto"`` runs native code if ``native_obstacle`` returns ``None``, else cuDNN if ``cudnn.obstacle`` does, else
            ``"reference"``.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        ValueError: Shapes do not fit, or ``backend="torch"`` and native code cannot run.

    Source: Dao et al., 2022, arXiv:2205.14135 (online softmax in blocks, recomputation in backward).
    """
    B, H, S, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; q must be [B, H, S, D], and k and v "
            "must be [B, H_kv, T, D] with H a multiple of H_kv"
        )
    if causal and k.shape[2] != S:
        raise ValueError(
            f"causal=True with {S} queries and {k.shape[2]} keys is ambiguous; pass a mask instead"
        )
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != (B, 1, S, k.shape[2])):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {(B, 1, S, k.shape[2])}"
        )
    if backend == "auto" and on_gpu(q.device) and cudnn.obstacle(q, k, v, mask, causal) is None:
        return cudnn.attend(q, k, v, scale)
    obstacle = native_obstacle(q, k, v, mask)
    choice = choose_backend("attention", backend)
    if backend == "torch" and obstacle:
        raise ValueError(f"backend='torch': {obstacle}; use backend='auto'")
    if choice == "reference" or obstacle:
        return attention_reference(q, k, v, scale, causal=causal, mask=mask)
    return run(Attention, q, k, v, mask, scale, causal)


def obstacle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Why ``attention`` has nothing faster than torch's own attention for these tensors, as a sentence, or ``None``."""
    if on_gpu(q.device):
        return cudnn.obstacle(q, k, v, mask, causal)
    return native_obstacle(q, k, v, mask)


def native_obstacle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why the native functions cannot run on these tensors, as a sentence, or ``None``."""
    if hides_native_calls():
        return "something records or watches torch operations, and it would miss a native call"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            return f"{name} is {tensor.dtype} on {tensor.device}, not float32 on the CPU"
        if tensor.layout is not torch.strided or tensor.is_neg():
            return f"{name} is not stored as its plain values"
        if tensor.stride(3) != 1 or tensor.numel() == 0:
            return f"the features of {name} are not contiguous, or it is empty"
    if q.shape[3] % HEAD_SIZE_MULTIPLE:
        return f"the head size {q.shape[3]} is not a multiple of {HEAD_SIZE_MULTIPLE}"
    if k.shape != v.shape:
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in shape"
    if mask is not None:
        shape = (q.shape[0], 1, q.shape[2], k.shape[2])
        if mask.dtype is not torch.bool or mask.shape != shape or mask.stride(3) != 1:
            return f"the mask is {mask.dtype} {tuple(mask.shape)}, not bool {shape} with contiguous keys"
        if type(mask) is not Tensor or mask.device.type != "cpu":
            return f"the mask is a {type(mask).__name__} on {mask.device}, not a plain tensor on the CPU"
    return native.obstacle()
