"""Shift the positions of tokens in a model with learned positions, for prefixes that had positions of their own in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkit.find.modules import base_modules
from peftkit.swap import swap_in, swap_out

_NAMES = {"wpe", "position_embeddings", "embed_positions", "position_embedding"}
_SITE = "_peftkit_moved_by"


class MovedPositions(nn.Embedding):
    """Mixed into the class of a position embedding: adds the offset of the active prefixes to the positions."""

    def peftkit_offset(self) -> int:
        """Return the current offset; 0 while the prefix is disabled."""
        return max((prefix.position_offset for prefix in self.__dict__[_SITE].chosen()), default=0)

    @property
    def offset(self) -> int:
        """The offset that the embedding's own forward adds to positions (OPT, BART), plus the offset of the prefixes."""
        own = self.__dict__.get("offset")
        if own is None:
            raise AttributeError("offset")
        return own + self.peftkit_offset()

    @offset.setter
    def offset(self, value: int) -> None:
        self.__dict__["offset"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the embedding's own forward with shifted positions."""
        if "offset" in self.__dict__:
            return super().forward(*args, **kwargs)
        positions, *others = args
        return super().forward(positions + self.peftkit_offset(), *others, **kwargs)


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """Return the position embeddings of a model. They are recognised by the names that model families use."""
    return [
        module
        for name, module in base_modules(model)
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES
    ]


def move_positions(model: nn.Module, site: nn.Module) -> None:
    """Let the prefixes of a model shift its tokens by their ``position_offset``.

    Args:
        model: The model; the class of its position embeddings is changed in place.
        site: The prefixes of one attention. The prefixes of the other attentions are active at the same time.

    Raises:
        ValueError: The model has no known position embedding.
    """
    tables = learned_positions(model)
    if not tables:
        raise ValueError(
            "position_offset: the model has no position embedding with a known name; leave position_offset at 0"
        )
    for table in tables:
        if not isinstance(table, MovedPositions):
            swap_in(table, MovedPositions)
            table.__dict__[_SITE] = site


def restore_positions(model: nn.Module) -> None:
    """Undo ``move_positions``."""
    for _, module in list(base_modules(model)):
        if isinstance(module, MovedPositions):
            swap_out(module, MovedPositions)
