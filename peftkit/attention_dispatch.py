"""Attention modules that ask transformers for another function than their model's config says.

transformers looks the function up by ``self.config._attn_implementation``. A module of such a class sees a config that reads
the same but for that one name, so masks, ``generate`` and the model's own config still say what they said.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

NATIVE = "peftkit_sdpa"
"""Name of the attention function that runs the native passes."""


class _Config:
    """A config as one attention module sees it."""

    def __init__(self, module: OwnAttention):
        object.__setattr__(self, "_module", module)

    @property
    def _attn_implementation(self) -> str | None:
        return self._module.peftkit_dispatch or self._module.peftkit_function()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module.__dict__["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module.__dict__["config"], name, value)


class OwnAttention(nn.Module):
    """Base of what is mixed into an attention module's own class; the mixins combine in any order."""

    peftkit_renames: ClassVar[dict[str, str]] = {}
    """Functions that are replaced: the model's name for one, and ours."""

    peftkit_dispatch: ClassVar[str | None] = None
    """A function that stands around whichever it is."""

    @property
    def config(self) -> Any:
        """The module's config, read through."""
        return _Config(self)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def peftkit_function(self) -> Any:
        """Name of the function that computes the attention, replacements applied."""
        name = self.__dict__["config"]._attn_implementation
        return self.peftkit_renames.get(name, name)


class Undispatched:
    """An attention module as seen by functions that read their own name in its config: flash attention loads its kernel by it."""

    def __init__(self, module: OwnAttention):
        self.peftkit_module = module
        self.config = module.__dict__["config"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peftkit_module, name)


def dispatches(module: nn.Module) -> bool:
    """Whether the module's own forward asks transformers' registry for the attention function."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and "config" in module.__dict__
