"""What the start of an adapter did: how far base and adapter together are from the weights, before and after."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerStart:
    """The start of one layer.

    Errors are ``‖W - (Q + scale · B A)‖ / ‖W‖`` in Frobenius norms, with the base weight ``Q`` as it is stored.

    Attributes:
        name: The layer's name in the base model.
        storage: How its weight is stored: ``"nf4"``, ``"int8"`` or a dtype.
        rank: The rank of its adapter.
        error_before: The error of the base alone.
        error_after: The error of the base and the adapter.
        norm: ``‖W‖``.
    """

    name: str
    storage: str
    rank: int
    error_before: float
    error_after: float
    norm: float


@dataclass(frozen=True)
class InitReport:
    """What ``initialise`` did.

    Attributes:
        init: The name of the initialisation, as in ``LoraConfig.init_lora_weights``.
        reference: Which weights ``W`` are.
        base_changed: Whether the base weights were changed. If so, the adapter belongs to the changed base only.
        layers: The layers that were initialised, in the model's order.
        left: Adapter layers that keep PEFT's default start, with the reason by name.
    """

    init: str
    reference: str
    base_changed: bool
    layers: tuple[LayerStart, ...]
    left: dict[str, str]

    @property
    def error_before(self) -> float:
        """The error of the base alone, over all layers together."""
        return _together((layer.error_before, layer.norm) for layer in self.layers)

    @property
    def error_after(self) -> float:
        """The error of the base and the adapter, over all layers together."""
        return _together((layer.error_after, layer.norm) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data."""
        sums = {"error_before": self.error_before, "error_after": self.error_after}
        return {**asdict(self), **sums}

    def __rich__(self) -> RenderableType:
        """Print as a table. The same module of different layers is one row."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"start of the adapter: {self.init}", title_justify="left")
        for column in ("layers", "n", "storage", "rank", "error before", "after"):
            right = column not in ("layers", "storage")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        groups: dict[tuple[str, str, int], list[LayerStart]] = {}
        for layer in self.layers:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
            groups.setdefault((pattern, layer.storage, layer.rank), []).append(layer)
        for (pattern, storage, rank), rows in groups.items():
            before = _together((row.error_before, row.norm) for row in rows)
            after = _together((row.error_after, row.norm) for row in rows)
            numbers = (_percent(before), _percent(after))
            table.add_row(Text(pattern), str(len(rows)), storage, str(rank), *numbers)
        total = (_percent(self.error_before), _percent(self.error_after))
        table.add_section()
        table.add_row("all", str(len(self.layers)), "", "", *total)
        lines: list[RenderableType] = [
            table,
            Text(f"errors are relative to {self.reference}"),
            Text(f"base weights {'changed' if self.base_changed else 'unchanged'}"),
        ]
        lines += [Text(f"left: {name}: {reason}") for name, reason in self.left.items()]
        return Group(*lines)

    def __str__(self) -> str:
        """The printed table as plain text."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue().rstrip()


def _together(errors: Iterable[tuple[float, float]]) -> float:
    """The relative error of several weights as one vector, from the relative error and the norm of each."""
    error2 = norm2 = 0.0
    for error, norm in errors:
        error2 += (error * norm) ** 2
        norm2 += norm**2
    return math.sqrt(error2 / norm2) if norm2 else 0.0


def _percent(error: float) -> str:
    return f"{100 * error:.2f} %"
