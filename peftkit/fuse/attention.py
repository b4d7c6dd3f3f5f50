"""Attention of transformers models: by the native passes (compiled C functions) on the CPU, by cuDNN on Hopper GPUs and later.

Fused modules get a class that looks up peftkit's attention function instead of ``sdpa`` (``attention_dispatch``). The function is
registered in transformers' ``AttentionInterface`` under its own name, so no existing function is replaced.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftkit.attention_dispatch import NATIVE, OwnAttention, depends_on_name
from peftkit.find.modules import is_quantised
from peftkit.fp8 import Float8Linear
from peftkit.fuse.plan import Fused, Reason, decline, forget_declined
from peftkit.swap import own_class, swap_in
from peftkit_kernels import native
from peftkit_kernels.core.launch import on_gpu
from peftkit_kernels.ops.attention import (
    HEAD_SIZE_MULTIPLE,
    attention,
    hardware_obstacle,
    obstacle,
    switched_off,
)

METHOD = "attention"

_MIN_QUERIES = 16
"""Calls with fewer queries, as in decoding, run torch's function, because a block of 64 would be mostly padding."""

_HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


_DROPS = "attention dropout of {} is on; the fused attention has none"

_PASSED = re.compile(
    r"dropout\w*\s*=\s*(?:0\.0 if not self\.training else self\.([\w.]+)|self\.([\w.]+) if self\.training else 0\.0)"
)
"""The source text with which transformers' attention modules pass their dropout."""

_SDPA = F.scaled_dot_product_attention
if not isinstance(_SDPA, types.BuiltinFunctionType):
    _SDPA = None  # replaced before peftkit was imported


class FusedAttention(OwnAttention, Fused):
    """Mixed into an attention module's own class; computes ``sdpa`` attention with our function."""

    peftkit_method = METHOD
    peftkit_renames: ClassVar[dict[str, str]] = {"sdpa": NATIVE}

    def peftkit_function(self) -> Any:
        """Name of the attention function to use: ``sdpa`` itself if the function registered under this name was replaced."""
        name = super().peftkit_function()
        return "sdpa" if name == NATIVE and replaced_reason(self) else name

    def peftkit_plan(self, x: Tensor | None) -> Any:
        """Our function, or why transformers' own runs. A call with another mask or length may still differ (``call_reason``)."""
        name = self.__dict__["config"]._attn_implementation
        if name != "sdpa":
            return Reason(f"the model's attention is {name}")
        return (
            replaced_reason(self)
            or call_dropout_reason(self)
            or _support_reason(self)
            or attention_forward
        )

    def peftkit_example(self) -> Any:
        """``None``: the decision does not depend on the input."""
        return None

    def peftkit_backend(self, x: Tensor | None, parts: Any) -> str:
        """``"torch"`` for the native passes on the CPU, ``"cudnn"`` on a GPU."""
        return "torch" if _device(self).type == "cpu" else "cudnn"


def fuse_attention(model: nn.Module) -> int:
    """Use our function in every attention module with ``sdpa`` on the CPU or a GPU with a faster one; returns the number of modules."""
    count = 0
    for module in model.modules():
        if isinstance(module, FusedAttention) or not _dispatches(module):
            continue
        device = _device(module)
        if device.type != "cpu" and not on_gpu(device):
            continue
        reason = (
            native.obstacle() if device.type == "cpu" else hardware_obstacle(device)
        ) or _module_reason(module, device)
        if reason is not None:
            decline(module, METHOD, reason)
            continue
        _register()
        forget_declined(module)
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
    """The attention function: ours if it supports the call, otherwise ``sdpa``. Arguments as in transformers."""
    causal = (
        attention_mask is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )
    if call_reason(query, key, value, attention_mask, dropout, causal, **kwargs) is not None:
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


def call_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    **kwargs: Any,
) -> str | None:
    """Why one call runs transformers' own function, or ``None``. Arguments as in transformers."""
    if dropout:
        return _DROPS.format(dropout)
    for name in ("position_bias", "cache", "softcap"):
        if kwargs.get(name) is not None:
            return f"the call has a {name}"
    if query.shape[2] < _MIN_QUERIES:
        return f"fewer than {_MIN_QUERIES} queries run torch's function, because a block of 64 would be mostly padding"
    if causal and query.shape[2] != key.shape[2]:
        return "the call is causal with more keys than queries"
    return obstacle(query, key, value, mask, causal)


def replaced_reason(module: Any) -> Reason | None:
    """The reason if ``sdpa`` is no longer transformers' function that calls torch's, or ``None``."""
    functions = getattr(
        sys.modules.get(own_class(module).__module__), "ALL_ATTENTION_FUNCTIONS", None
    )
    try:
        registered = functions["sdpa"]  # pyright: ignore[reportOptionalSubscript]
    except (KeyError, TypeError):
        registered = None
    if registered is not sdpa_attention_forward:
        return Reason("the attention function registered as 'sdpa' is not transformers' own")
    if F.scaled_dot_product_attention is not _SDPA:
        return Reason("torch.nn.functional.scaled_dot_product_attention was replaced")
    return None


def call_dropout_reason(module: nn.Module) -> Reason | None:
    """The reason if the module uses attention dropout now, as its forward passes it, or ``None``."""
    if not module.training:
        return None
    path = _dropout_of(own_class(module))
    try:
        rate = operator.attrgetter(path)(module) if path else 0.0
    except AttributeError:
        return None
    return Reason(_DROPS.format(rate)) if isinstance(rate, float) and rate > 0.0 else None


def _support_reason(module: nn.Module) -> Reason | None:
    """The reason if our function does not run on the module's device or in the dtype of its queries and keys, or ``None``.

    Their dtype is that of the frozen weights, or that in which a float8 weight was loaded.
    """
    plain = [p for p in module.parameters() if not is_quantised(p)]
    frozen = [p.dtype for p in plain if not p.requires_grad]
    frozen += [part.compute_dtype for part in module.modules() if isinstance(part, Float8Linear)]
    dtype = next(iter(frozen or [p.dtype for p in plain]), torch.float32)
    device = _device(module)
    if device.type != "cpu":
        found = switched_off() or hardware_obstacle(device)
        if found is None and dtype is torch.float32:
            found = "its queries and keys are float32; cuDNN's attention computes in 16 bits"
        return None if found is None else Reason(found)
    if dtype is torch.float32:
        return None
    return Reason(f"its queries and keys are {dtype}; the native passes compute in float32")


def _device(module: nn.Module) -> torch.device:
    """The device of the module's weights."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@functools.cache
def _dropout_of(cls: type) -> str:
    """The attribute that the forward of ``cls`` passes as dropout in training, according to its source; empty if none."""
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError, AttributeError):
        return ""
    found = _PASSED.search(source)
    return next(filter(None, found.groups())) if found else ""


def _dispatches(module: nn.Module) -> bool:
    """Whether this is an attention module that looks up its function in transformers' registry."""
    return (
        "Attention" in type(module).__name__
        and hasattr(module.__dict__.get("config"), "_attn_implementation")
        and hasattr(sys.modules.get(own_class(module).__module__), "ALL_ATTENTION_FUNCTIONS")
    )


def _module_reason(module: Any, device: torch.device) -> str | None:
    """Why our function cannot replace the one that an attention module uses at present."""
    name = module.__dict__["config"]._attn_implementation
    if name != "sdpa":
        return f"the model's attention is {name}; only sdpa is replaced"
    if depends_on_name(module):
        return "its code compares the name of the attention function, and would compute something else for another name"
    if device.type != "cpu":
        return None
    sizes = (getattr(module, name, None) for name in _HEAD_SIZE_NAMES)
    head_size = next((size for size in sizes if isinstance(size, int)), HEAD_SIZE_MULTIPLE)
    if head_size % HEAD_SIZE_MULTIPLE:
        return f"its head size is {head_size}; the native passes need a multiple of {HEAD_SIZE_MULTIPLE}"
    return None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NATIVE, attention_forward)
