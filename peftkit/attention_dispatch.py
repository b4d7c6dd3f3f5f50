"""Run another attention function in a single module than the one that the model's config names.

transformers finds the function by ``self.config._attn_implementation``. The classes here replace ``self.config`` of an
attention module by a proxy in which only this name differs. The model's own config is unchanged, so masks and ``generate`` are
unchanged.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

NATIVE = "peftkit_sdpa"
"""Name of peftkit's attention function, which replaces ``sdpa`` (``fuse.attention``)."""


class _Config:
    """A proxy of the model's config for one attention module."""

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
    """Base of the classes that are mixed into the class of an attention module. They can be combined in any order."""

    peftkit_renames: ClassVar[dict[str, str]] = {}
    """Attention functions to replace: the name in the model's config, and the name of peftkit's function."""

    peftkit_dispatch: ClassVar[str | None] = None
    """Name of a function that transformers calls instead; it calls ``peftkit_function`` itself."""

    @property
    def config(self) -> Any:
        """A proxy of the module's config."""
        return _Config(self)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def peftkit_function(self) -> Any:
        """Return the name of the function that computes the attention, after ``peftkit_renames``."""
        name = self.__dict__["config"]._attn_implementation
        return self.peftkit_renames.get(name, name)


class Undispatched:
    """An attention module with the model's own config, for functions that read their name in it.

    Flash attention, for example, loads its kernel by this name.
    """

    def __init__(self, module: OwnAttention):
        self.peftkit_module = module
        self.config = module.__dict__["config"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peftkit_module, name)


def dispatches(module: nn.Module) -> bool:
    """Whether the module's own forward gets its attention function from transformers' registry."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and "config" in module.__dict__


def depends_on_name(module: nn.Module) -> bool:
    """Whether the module's code does more with the name of the attention function than to look the function up.

    Sparse attention (DeepSeek-V3.2, GLM-5) adds the mask of the chosen keys for the names ``eager`` and ``sdpa`` alone, so under another
    name it would attend to all keys. True if the code cannot be read.
    """
    own = [
        cls
        for cls in type(module).__mro__
        if issubclass(cls, nn.Module)
        and cls is not nn.Module
        and not cls.__module__.startswith("peftkit.")
        and "_peftkit_swap" not in vars(cls)
    ]
    return any(map(_compares_name, own))


@functools.cache
def _compares_name(cls: type) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(not _is_harmless(node, parent) for node, parent in _names_read(tree))


def _names_read(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Where code reads the name, and the expression around it."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Attribute) and node.attr == "_attn_implementation":
                yield node, parent


def _is_harmless(node: ast.AST, parent: ast.AST) -> bool:
    """Whether the name is looked up, or compared with ``eager``, for which no fused function stands."""
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Attribute) and parent.func.attr == "get_interface"
    if isinstance(parent, ast.Subscript):
        return parent.slice is node
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Eq, ast.NotEq)) for op in parent.ops) and all(
            isinstance(other, ast.Constant) and other.value == "eager"
            for other in parent.comparators
        )
    return False
