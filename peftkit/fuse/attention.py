"""The attention call of transformers models, sent to the native passes on the CPU.

The modules get a class that sees another name for ``sdpa`` (``attention_dispatch``). The function is registered where transformers
asks for it (``AttentionInterface``); nothing that exists is replaced.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor, nn

from peftkit.attention_dispatch import NATIVE, OwnAttention
from peftkit.swap import swap_in
from peftkit_kernels import native
from peftkit_kernels.attention import HEAD_SIZE_MULTIPLE, attention, native_obstacle

_MIN_QUERIES = 16
"""Decoding a few tokens is left to torch: a block of 64 queries would be mostly padding."""

_HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


class FusedAttention(OwnAttention):
    """Mixed into an attention module's own class: its ``sdpa`` is ours."""

    peftkit_method = "attention"
    peftkit_renames: ClassVar[dict[str, str]] = {"sdpa": NATIVE}

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is transformers' own."""
        name = self.__dict__["config"]._attn_implementation
        return (
            ("fused:torch", "") if name == "sdpa" else ("peft", f"the model's attention is {name}")
        )


def fuse_attention(model: nn.Module) -> int:
    """Give every dispatching ``sdpa`` attention module of a model on the CPU our function; returns their number."""
    if native.obstacle() or any(p.device.type != "cpu" for p in model.parameters()):
        return 0
    count = 0
    for module in model.modules():
        if not isinstance(module, FusedAttention) and _dispatches(module):
            _register()
            swap_in(module, FusedAttention)
            count += 1
    return count


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ours where it can run, ``sdpa`` elsewhere; arguments as transformers gives them."""
    queries, keys = query.shape[2], key.shape[2]
    causal = (
        attention_mask is None
        and queries > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )
    special = dropout or any(
        kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")
    )
    if (
        special
        or queries < _MIN_QUERIES
        or (causal and queries != keys)
        or native_obstacle(query, key, value, attention_mask)
    ):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, scale, causal=causal, mask=attention_mask), None


def _dispatches(module: nn.Module) -> bool:
    """Whether this is an attention module that asks transformers' registry, now with ``sdpa``."""
    config = module.__dict__.get("config")
    modeling = sys.modules.get(type(module).__module__)
    sizes = (getattr(module, name, None) for name in _HEAD_SIZE_NAMES)
    head_size = next((size for size in sizes if isinstance(size, int)), HEAD_SIZE_MULTIPLE)
    return (
        "Attention" in type(module).__name__
        and head_size % HEAD_SIZE_MULTIPLE == 0
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")
    )


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NATIVE, attention_forward)
