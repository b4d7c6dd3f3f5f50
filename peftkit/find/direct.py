"""Linear layers whose weight a model multiplies itself instead of calling the layer, so that an adapter around it would never run."""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn

_OPERAND = re.compile(r"(?<![.\w])self\.(\w+)\.weight\b(?!\.(?:device|dtype|shape)\b)")


def weights_used_directly(module: nn.Module) -> frozenset[str]:
    """The names of such layers in a mixer of a state-space model (Mamba) or an attention that calls ``F.multi_head_attention_forward`` (WavLM).

    Some of Mamba's are used directly by its fused scan on a GPU alone. Other modules do so in calls that training does not make.

    Args:
        module: The module that contains the layers.
    """
    if hasattr(module, "A_log"):
        return _operands(type(module))
    return _operands(type(module)) if _calls_functional(type(module)) else frozenset()


@functools.cache
def _operands(cls: type) -> frozenset[str]:
    lines = [line for line in _source(cls).splitlines() if "init." not in line]
    return frozenset(_OPERAND.findall("\n".join(lines)))


@functools.cache
def _calls_functional(cls: type) -> bool:
    return "F.multi_head_attention_forward(" in _source(cls)


@functools.cache
def _source(cls: type) -> str:
    """The source of a class; of a class that was made at runtime that of its bases."""
    found = []
    for one in cls.__mro__:
        if one in (nn.Module, object):
            continue
        try:
            found.append(inspect.getsource(one))
        except (OSError, TypeError):
            continue
    return "\n".join(found)
