"""Moving the tokens of a model with learned positions, for prefixes that were trained where they took up positions themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkit.find.modules import base_modules
from peftkit.swap import swap_in, swap_out

_NAMES = {"wpe", "position_embeddings", "embed_positions", "position_embedding"}
_SITE = "_peftkit_moved_by"


class MovedPositions(nn.Embedding):
    """Mixed into a table of positions: looks up positions that are larger by the offset of the prefixes in use."""

    def peftkit_offset(self) -> int:
        """How far the tokens are moved now: by nothing while the prefix is disabled."""
        return max((prefix.position_offset for prefix in self.__dict__[_SITE].chosen()), default=0)

    @property
    def offset(self) -> int:
        """What the table's own forward adds to positions (OPT, BART), and ours with it."""
        own = self.__dict__.get("offset")
        if own is None:
            raise AttributeError("offset")
        return own + self.peftkit_offset()

    @offset.setter
    def offset(self, value: int) -> None:
        self.__dict__["offset"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The table's own forward, with the positions moved."""
        if "offset" in self.__dict__:
            return super().forward(*args, **kwargs)
        positions, *others = args
        return super().forward(positions + self.peftkit_offset(), *others, **kwargs)


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """The tables of positions of a model, by the names the families give them."""
    return [
        module
        for name, module in base_modules(model)
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES
    ]


def move_positions(model: nn.Module, site: nn.Module) -> None:
    """Let the prefixes of a model move its tokens, each by its ``position_offset``.

    Args:
        model: Its tables of positions are changed in place.
        site: The prefixes of one attention; those of the others are in use together with them.

    Raises:
        ValueError: The model has no table of positions known here.
    """
    tables = learned_positions(model)
    if not tables:
        raise ValueError(
            "position_offset: the model has no table of learned positions known here; leave position_offset at 0"
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
