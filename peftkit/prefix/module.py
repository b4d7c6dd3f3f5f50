"""A KV prefix, and the place where the prefixes of one attention live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.own_attention import OwnAttention
from peftkit.prefix.attention import IMPLEMENTATION, OP, gated_attention, standing_obstacle
from peftkit_kernels.dispatch import choose_backend

CHILD = "kv_prefix"


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
        joined_because: Why the last call put the prefix in front of the keys instead of merging two passes; empty where it
            merged them, ``None`` before the first call.
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
        if any(prefix.gate is not None for prefix in self.chosen()):
            return "torch", "a softmax of its own, added to the model's attention"
        reason, keys = self.joined_because, [prefix.key for prefix in self.chosen()]
        if reason is None and self.owner and keys:
            (module,) = self.owner
            reason = standing_obstacle(module.peftkit_function(), keys[0])
        if reason:
            return "torch", f"in front of the keys: {reason}"
        return f"fused:{choose_backend(OP, 'auto', *keys, has_dot=False)}", ""

    def forward(
        self, query: Tensor, key: Tensor, scale: float, softcap: float | None
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Collect the prefixes without a gate, and compute the attention of those with one.

        Args:
            query: ``[B, H, S, D]``.
            key: ``[B, H_kv, T, D]``.
            scale: Factor on the scores.
            softcap: Bound on the scores, for models that have one.

        Returns:
            Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of those without a gate, and ``[B, S, H, D_v]``, what those
            with one add; each ``None`` where there are none.

        Raises:
            ValueError: A prefix is not of the shape of the keys.
        """
        keys, values, extra = [], [], None
        for prefix in self.chosen():
            if prefix.key.shape[0] != key.shape[1] or prefix.key.shape[2] != key.shape[3]:
                raise ValueError(
                    f"the prefix has {prefix.key.shape[0]} heads of {prefix.key.shape[2]} features, the keys of this attention "
                    f"{key.shape[1]} of {key.shape[3]}; leave the module out by exclude_modules"
                )
            if prefix.gate is None:
                keys.append(prefix.key)
                values.append(prefix.value)
            else:
                pk, pv = prefix.key.to(query.dtype), prefix.value.to(query.dtype)
                part = gated_attention(query, pk, pv, prefix.gate, scale, softcap)
                extra = part if extra is None else extra + part
        if len(keys) > 1:
            keys, values = [torch.cat(keys, 1)], [torch.cat(values, 1)]
        return ((keys[0], values[0]) if keys else None), extra


class PrefixAttention(OwnAttention):
    """Mixed into an attention module's own class: the attention call passes through its prefixes."""

    peftkit_dispatch = IMPLEMENTATION
