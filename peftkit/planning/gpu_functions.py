"""Functions that torch computes in other operations on a GPU than on the meta device, where they store more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLASH_HEAD_SIZE = 256


class GPUFunctions(TorchFunctionMode):
    """Runs attention and dropout of tensors on the meta device by the operations that torch runs on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The result of a function of torch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return _attention(*args, **kwargs)
        if func is F.dropout and args and args[0].is_meta:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention, by the conditions under which torch chooses flash attention."""
    aten = torch.ops.aten
    if attn_mask is None and q.dtype.itemsize == 2 and q.shape[-1] <= _FLASH_HEAD_SIZE:
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = attn_mask.to(q.dtype)
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout whose mask has one byte for each value."""
    if not training or not p or inplace:
        return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)
    return torch.native_dropout(input, p, True)[0]
