"""The configuration of KV prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from peftkit.find.values import require_bool, require_integer, require_integers, require_number
from peftkit.peft_types import PeftkitType

STACKS = ("encoder", "decoder", "cross")


@dataclass
class PrefixConfig(PeftConfig):
    """KV prefix: trained keys and values before an attention's own keys and values. No mask hides the prefix from a query.

    A prefix with a gate works with every attention function of transformers. A prefix without a gate works with ``sdpa``,
    ``eager``, ``flex_attention`` (which torch can train on GPUs only) and flash attention. Flash attention raises an error if a
    text is longer than a sliding window, because the window would hide the prefix.

    Source: Li and Liang, 2021, arXiv:2101.00190; the gate: Zhang et al., 2023, arXiv:2303.16199, equation 6.
    """

    num_virtual_tokens: int = 16
    """Number of keys and values added to each attention."""

    init: Literal["random", "text"] = "random"
    """``random``: normally distributed. ``text``: the keys and values that the base model computes for ``init_token_ids``."""

    init_token_ids: list[int] | None = None
    """Tokens for ``init="text"``, repeated or truncated to ``num_virtual_tokens``."""

    init_std: float = 0.02
    """Standard deviation for ``init="random"``."""

    gate: bool = False
    """Add the attention over the prefix, multiplied by ``tanh(gate)``, to the attention over the tokens. ``gate`` is one
    trained number per head. It starts at zero, so a new adapter does not change the base model's output. Without a gate, prefix
    and tokens share one softmax, so a new adapter changes the output."""

    attention: list[str] = field(default_factory=lambda: list(STACKS))
    """Attentions of an encoder-decoder that get a prefix: ``encoder`` and ``decoder`` (their self-attentions) and ``cross``.
    For other models this field has no effect."""

    position_offset: int = 0
    """Number added to the positions of the tokens while the prefix is active, in models with learned position vectors. PEFT's
    prefixes need it, because they take positions of their own; ``import_adapter`` sets it."""

    layers: list[int] | None = None
    """Indices of the layers that get a prefix. Default: all layers."""

    target_modules: list[str] | str | None = None
    """Names of the attention modules. Default: all attentions that ``attention`` and ``layers`` select."""

    exclude_modules: list[str] | str | None = None
    """Modules that get no prefix."""

    modules_to_save: list[str] | None = None
    """Modules that are trained and saved in full, such as a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftkitType.PEFTKIT_PREFIX
        require_integer("num_virtual_tokens", self.num_virtual_tokens, 1)
        require_integer("position_offset", self.position_offset, 0)
        require_integers("layers", self.layers)
        require_integers("init_token_ids", self.init_token_ids)
        require_number("init_std", self.init_std)
        if self.init_std < 0:
            raise ValueError(
                f"init_std={self.init_std} is negative, but it is a standard deviation; use 0 or more"
            )
        require_bool("gate", self.gate)
        if self.init not in ("random", "text"):
            raise ValueError(f"init={self.init!r} is unknown; use 'random' or 'text'")
        if (self.init == "text") != bool(self.init_token_ids):
            raise ValueError(
                f"init={self.init!r} and init_token_ids={self.init_token_ids} do not fit together; give init_token_ids with "
                "init='text', and only with it"
            )
        known = isinstance(self.attention, (list, tuple, set)) and set(self.attention) <= set(
            STACKS
        )
        if not known or not self.attention:
            raise ValueError(
                f"attention={self.attention!r} is not a list of {', '.join(STACKS)}; give one or more of them"
            )
