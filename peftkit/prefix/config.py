"""What a user says about KV prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from peftkit.find.values import require_bool, require_integer, require_integers, require_number
from peftkit.peft_types import PeftkitType

STACKS = ("encoder", "decoder", "cross")


@dataclass
class PrefixConfig(PeftConfig):
    """KV prefix: trained keys and values in front of an attention's own, seen by every query, masked by nothing.

    With a gate it runs in any attention function of transformers. Without one it runs in ``sdpa``, ``eager``, ``flex_attention``
    (which torch trains on GPUs only) and flash attention, which raises where a text is longer than a sliding window: the window
    would hide the prefix.

    Source: Li and Liang, 2021, arXiv:2101.00190; the gate: Zhang et al., 2023, arXiv:2303.16199, equation 6.
    """

    num_virtual_tokens: int = 16
    """Keys and values added to each attention."""

    init: Literal["random", "text"] = "random"
    """``text``: the keys and values that the base model itself computes for ``init_token_ids``."""

    init_token_ids: list[int] | None = None
    """Tokens for ``init="text"``, repeated or cut to ``num_virtual_tokens``."""

    init_std: float = 0.02
    """Standard deviation for ``init="random"``."""

    gate: bool = False
    """Add the prefix's own attention times ``tanh(gate)``, a trained number a head that starts at zero: the base model's output
    at the start. Without it the prefix shares one softmax with the tokens, and takes its part of it from the first step."""

    attention: list[str] = field(default_factory=lambda: list(STACKS))
    """Which attentions of an encoder-decoder: ``encoder``, ``decoder`` (their self-attentions) and ``cross``. Models with one
    stack get prefixes in it in any case."""

    position_offset: int = 0
    """Added to the positions of the tokens while the prefix is in use, where positions are learned vectors. For prefixes that were
    trained where they took up positions themselves, as PEFT's; ``import_adapter`` sets it."""

    layers: list[int] | None = None
    """Numbers of the layers that get a prefix; all where left out."""

    target_modules: list[str] | str | None = None
    """The attention modules; found where left out."""

    exclude_modules: list[str] | str | None = None
    """Modules that stay as they are."""

    modules_to_save: list[str] | None = None
    """Modules trained and saved as a whole, such as a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftkitType.PEFTKIT_PREFIX
        require_integer("num_virtual_tokens", self.num_virtual_tokens, 1)
        require_integer("position_offset", self.position_offset, 0)
        require_integers("layers", self.layers)
        require_integers("init_token_ids", self.init_token_ids)
        require_number("init_std", self.init_std)
        if self.init_std < 0:
            raise ValueError(f"init_std={self.init_std} is negative; it is a standard deviation")
        require_bool("gate", self.gate)
        if self.init not in ("random", "text"):
            raise ValueError(f"init={self.init!r} is unknown; use 'random' or 'text'")
        if (self.init == "text") != bool(self.init_token_ids):
            raise ValueError(
                f"init={self.init!r} and init_token_ids={self.init_token_ids}: give token ids with init='text', and only there"
            )
        known = isinstance(self.attention, (list, tuple, set)) and set(self.attention) <= set(
            STACKS
        )
        if not known or not self.attention:
            raise ValueError(
                f"attention={self.attention!r} must be a list; choose from {', '.join(STACKS)}"
            )
