"""Dense causal attention by cuDNN, which on Hopper and later takes about half the time of torch's flash attention.

Measured on an H100, forward and backward, 1 x 4096 tokens, 32 heads with 8 key heads of size 128: cuDNN 1.07 ms, flash 1.98 ms
(``benchmarks/results/gpu-h100.json``).

cuDNN plans each new length for a tenth of a second and more, so lengths are padded to buckets: a causal query never sees the
keys behind it, and rows behind the last query are cut off. No global switch of torch is changed.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.launch import counted_target
from peftkit_kernels.core.modes import is_transformed

BUCKET = 256
MIN_QUERIES = 512
"""With fewer queries attention takes little time, and padding to a bucket would waste much of it."""
MAX_HEAD_SIZE = 128


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal ``softmax(scale q kᵀ) v``, ``[B, S, H, D]``, for tensors without ``obstacle``; shapes as for ``attention``."""
    S = q.shape[2]
    rest = -S % BUCKET
    if rest:
        q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
    return _attend(q, k, v, scale)[:, :, :S].transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same in the layout of ``q``, for a length that is a multiple of ``BUCKET``."""
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attention(q, k, v, None, keeps, 0.0, True, False, scale=scale)[0]


def obstacle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Why cuDNN does not compute this attention, as a sentence, or ``None``."""
    if is_transformed():
        return "something records or transforms torch operations"
    if mask is not None or not causal:
        return "only dense causal attention runs on cuDNN"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype:
            return f"{name} is {tensor.dtype} and q {q.dtype}"
    if is_autocast_enabled(q.device.type):
        return "autocast is on, and it converts the arguments of torch's own attention"
    size, head_size = q.shape[2], q.shape[3]
    if k.shape[2] != size or v.shape[3] != head_size:
        return f"there are {size} queries and {k.shape[2]} keys of size {head_size} and {v.shape[3]}; cuDNN runs if they are equal"
    if any(t.stride(3) != 1 for t in (q, k, v)):
        return "the features of a head are not contiguous"
    return size_obstacle(q, size, head_size)


def size_obstacle(x: Tensor, length: int, head_size: int) -> str | None:
    """Why cuDNN does not compute the causal attention of queries with the dtype and device of ``x``, or ``None``.

    Args:
        x: Any tensor with this dtype and device.
        length: Number of queries and of keys.
        head_size: Features of a head.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its input is {x.dtype}; cuDNN's attention computes in 16 bits"
    if length < MIN_QUERIES:
        return f"there are {length} queries; cuDNN runs from {MIN_QUERIES}"
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return f"the head size is {head_size}; it must be a multiple of 8 up to {MAX_HEAD_SIZE}"
    return switched_off() or hardware_obstacle(x.device)


def switched_off() -> str | None:
    """Why the user's settings exclude cuDNN, or ``None``."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN's attention is switched off (torch.backends.cuda.enable_cudnn_sdp)"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch's flash attention is switched off, so another attention was asked for"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    if _prefers_another():
        return "another order of attention backends was asked for (sdpa_kernel)"
    return None


def _prefers_another() -> bool:
    """Whether the user has changed torch's order of backends so that cuDNN is not first.

    torch itself moves cuDNN to the front in its first attention on some GPUs.
    """
    order = _order()
    cudnn = int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    return order != _ORDER and order[:1] != [cudnn]


def _order() -> list[int]:
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return [] if order is None else list(order())


_ORDER = _order()


def hardware_obstacle(device: torch.device) -> str | None:
    """``device_obstacle``; while launches are counted, tensors on the meta device stand for those of that GPU."""
    target = counted_target() if device.type == "meta" else None
    if target is None:
        return device_obstacle(device)
    return None if (target.capability or 0) >= 90 else f"cuDNN is not used on {target.arch}"


@functools.cache
def device_obstacle(device: torch.device) -> str | None:
    """Why cuDNN's attention is not used on a device, as a sentence, or ``None``."""
    if device.type != "cuda" or torch.version.hip:
        return f"its tensors are on {device}, which is not an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return (
            f"cuDNN is not known to be faster than flash attention on this GPU (sm_{major}{minor})"
        )
    if not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    return None
