"""Tiny models with KV prefixes that are large enough to change the output."""

import families
import torch
from torch import nn

from peftkit.prefix import Prefix, PrefixConfig, add_prefixes

P = 3
EAGER_ONLY = ("gemma2", "gpt_oss")
"""Families whose soft caps or sinks ``sdpa`` would ignore."""


def prefixed(name: str, implementation: str = "sdpa", **fields) -> nn.Module:
    """A tiny model with prefixes of the size of its keys, so that a missing or doubled prefix changes the output."""
    model = families.family(name)
    model.set_attn_implementation(implementation)
    add_prefixes(model, PrefixConfig(num_virtual_tokens=P, init_std=0.7, **fields))
    for module in model.modules():
        if isinstance(module, Prefix) and module.gate is not None:
            nn.init.constant_(module.gate, 0.4)
    return model


def doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def first(output) -> torch.Tensor:
    """The main output of a model of any family."""
    return next(
        output[k] for k in ("logits", "logits_per_text", "last_hidden_state") if k in output
    )
