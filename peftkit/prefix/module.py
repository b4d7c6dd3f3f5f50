"""A KV prefix, and the place where the prefixes of one attention live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.attention_dispatch import OwnAttention
from peftkit.prefix.attention import (
    IMPLEMENTATION,
    OP,
    standing_gated_obstacle,
    standing_obstacle,
)
from peftkit_kernels.dispatch import choose_backend

CHILD = "virtual_tokens"
"""Name of the child module. PEFT takes every key that contains an adapter's name for a key of that adapter, so no usual name
may be part of it; TRL's reference adapter is called ``ref``, which rules out any ``prefix``."""


class Prefix(nn.Module):
    """Keys and values of one adapter in one attention.

    Args:
        kv_heads: Heads of keys and values, before any are repeated.
        num_virtual_tokens: Number of keys.
        key_size: Features of a key.
        value_size: Features of a value.
        std: Standard deviation of the initial numbers.
        gated_heads: Heads of the queries, to add the prefix's own attention times a gate that starts at zero; ``None`` to let
            the prefix share the softmax of the tokens.
        device: Of the new parameters.
        dtype: Of the new parameters.
    """

    peftkit_adapter = True

    def __init__(
        self,
        kv_heads: int,
        num_virtual_tokens: int,
        key_size: int,
        value_size: int,
        std: float,
        gated_heads: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key = nn.Parameter(torch.randn(kv_heads, num_virtual_tokens, key_size, **place) * std)
        self.value = nn.Parameter(
            torch.randn(kv_heads, num_virtual_tokens, value_size, **place) * std
        )
        self.gate = None if gated_heads is None else nn.Parameter(torch.zeros(gated_heads, **place))


class PrefixSite(nn.Module):
    """Child of an attention module; one prefix a name, all in use.

    Attributes:
        joined_because: Why the last call did not merge the passes over prefix and tokens; empty where it did, ``None`` before the
            first call.
        owner: The attention module, in a tuple, so that it is not taken for a child.
    """

    peftkit_adapter = True

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.joined_because: str | None = None
        self.owner: tuple[Any, ...] = ()

    def chosen(self) -> list[Any]:
        """The prefixes that take part in a forward."""
        return list(self.adapters.values())

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path of the last call, or of the next one as far as it can be told, and the reason where it is not fused."""
        reason, chosen = self.joined_because, self.chosen()
        gated = any(prefix.gate is not None for prefix in chosen)
        keys = [prefix.key for prefix in chosen]
        if reason is None and self.owner and keys:
            (module,) = self.owner
            standing = standing_gated_obstacle if gated else standing_obstacle
            reason = standing(module.peftkit_function(), keys[0])
        if gated and len(chosen) > 1:
            reason = f"{len(chosen)} prefixes are active"
        if reason:
            how = "a softmax of its own, added to the model's" if gated else "in front of the keys"
            return "torch", f"{how}: {reason}"
        return f"fused:{choose_backend(OP, 'auto', *keys, has_dot=False)}", ""

    def note(self, reason: str | None) -> None:
        """Keep why a call did not merge the passes, for ``peftkit_verdict``."""
        if not torch.compiler.is_compiling():
            self.joined_because = reason or ""

    def forward(
        self, query: Tensor, key: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, list[Prefix]]:
        """Collect the prefixes, those without a gate one behind the other.

        Args:
            query: ``[B, H, S, D]``.
            key: ``[B, H_kv, T, D]``.

        Returns:
            Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of those without a gate, or ``None``; and those with one.

        Raises:
            ValueError: A prefix is not of the shape of the keys.
        """
        shared, gated = [], []
        for prefix in self.chosen():
            if prefix.key.shape[0] != key.shape[1] or prefix.key.shape[2] != key.shape[3]:
                raise ValueError(
                    f"the prefix has {prefix.key.shape[0]} heads of {prefix.key.shape[2]} features, the keys of this attention "
                    f"{key.shape[1]} of {key.shape[3]}; leave the module out by exclude_modules"
                )
            (shared if prefix.gate is None else gated).append(prefix)
        keys, values = [p.key for p in shared], [p.value for p in shared]
        if len(shared) > 1:
            keys, values = [torch.cat(keys, 1)], [torch.cat(values, 1)]
        return ((keys[0], values[0]) if shared else None), gated


class PrefixAttention(OwnAttention):
    """Mixed into an attention module's own class: the attention call passes through its prefixes."""

    peftkit_dispatch = IMPLEMENTATION
