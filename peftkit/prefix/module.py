"""The modules of KV prefixes: one prefix, and the container of all prefixes of one attention."""

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
from peftkit_kernels.core.dispatch import choose_backend

CHILD = "virtual_tokens"
"""Name of the child module. PEFT assigns every key that contains an adapter's name to this adapter, so the name must not
contain a usual adapter name. TRL names its reference adapter ``ref``, which excludes names with ``prefix``."""


class Prefix(nn.Module):
    """Keys and values of one adapter in one attention.

    Args:
        kv_heads: Number of key and value heads, before they are repeated for grouped queries.
        num_virtual_tokens: Number of keys and values per head.
        key_size: Features of a key.
        value_size: Features of a value.
        std: Standard deviation of the initial values.
        gated_heads: Number of query heads, for a prefix with a gate per head that starts at zero. ``None`` for a prefix that
            shares the softmax of the tokens.
        device: Device of the new parameters.
        dtype: Dtype of the new parameters.

    Attributes:
        key: ``[kv_heads, num_virtual_tokens, key_size]``.
        value: ``[kv_heads, num_virtual_tokens, value_size]``.
        gate: ``[gated_heads]``, or ``None``.
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
    """Child of an attention module with one prefix per adapter name. All prefixes are used.

    Attributes:
        joined_because: Why the last call did not use the fused op. Empty if it did, ``None`` before the first call.
        owner: The attention module, in a tuple so that torch does not register it as a child.
    """

    peftkit_adapter = True

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.joined_because: str | None = None
        self.owner: tuple[Any, ...] = ()

    def chosen(self) -> list[Any]:
        """Return the prefixes that a forward uses."""
        return list(self.adapters.values())

    def peftkit_verdict(self) -> tuple[str, str]:
        """Return the path of a call, and the reason if the path is not fused.

        The path is that of the last call. Before the first call, it is the expected path of the next one.
        """
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
            how = (
                "separate softmax, added to the model's" if gated else "concatenated with the keys"
            )
            return "torch", f"{how}: {reason}"
        return f"fused:{choose_backend(OP, 'auto', *keys, has_dot=False)}", ""

    def note(self, reason: str | None) -> None:
        """Record why a call did not use the fused op, for ``peftkit_verdict``."""
        if not torch.compiler.is_compiling():
            self.joined_because = reason or ""

    def forward(
        self, query: Tensor, key: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, list[Prefix]]:
        """Collect the prefixes. Those without a gate are concatenated.

        Args:
            query: ``[B, H, S, D]``.
            key: ``[B, H_kv, T, D]``.

        Returns:
            The keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of the prefixes without a gate, or ``None`` if there are
            none; and the list of prefixes with a gate.

        Raises:
            ValueError: A prefix has another number of heads or features than the keys.
        """
        shared, gated = [], []
        for prefix in self.chosen():
            if prefix.key.shape[0] != key.shape[1] or prefix.key.shape[2] != key.shape[3]:
                raise ValueError(
                    f"the prefix has {prefix.key.shape[0]} heads of {prefix.key.shape[2]} features, but the keys of this "
                    f"attention have {key.shape[1]} heads of {key.shape[3]} features; list the module in exclude_modules"
                )
            (shared if prefix.gate is None else gated).append(prefix)
        keys, values = [p.key for p in shared], [p.value for p in shared]
        if len(shared) > 1:
            keys, values = [torch.cat(keys, 1)], [torch.cat(values, 1)]
        return ((keys[0], values[0]) if shared else None), gated


class PrefixAttention(OwnAttention):
    """Mixed into the class of an attention module: its attention function becomes ``prefix_attention``."""

    peftkit_dispatch = IMPLEMENTATION
