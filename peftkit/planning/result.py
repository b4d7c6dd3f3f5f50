"""``MemoryPlan``: what a training step needs, itemised."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.report_page import Stack

_BAR_WIDTH = 60
_SIGNS = "█▓▒░▚▞■□●○◆◇"
_MINOR = 0.005
"""Items below this share of the peak are shown together."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step, before anything is loaded.

    Attributes:
        peak_bytes: The most memory that is in use at one moment: weights, adapters, and everything that the step adds.
        items: What that memory holds, in bytes; the sum is ``peak_bytes``.
        phase: When the peak is: in the ``"forward"``, the ``"backward"`` or the ``"optimizer"``.
        module: The module that runs then; empty for the model itself.
        loaded_bytes: The memory of the loaded model with its adapters and a batch, before the first step.
        peaks: The largest memory in each phase.
        reserved_bytes: What torch's allocator takes from the device at most, with its rounding and fragmentation. On the CPU, where
            memory is returned, it is ``peak_bytes``.
        allocated_bytes: The sum of all allocations of a step, which is about what its operations write.
        trained: Number of trained parameters.
        parameters: Number of all parameters; packed 4-bit weights count once for each weight.
        multiplied: Number of parameters by which a token is multiplied: matrices but for embeddings, and of experts the share that a
            token is routed to.
        settings: What was planned.
        basis: ``"CPU"``: the same code allocates in a real run. ``"predicted"``: a GPU's own buffers follow rules.
    """

    peak_bytes: int
    items: dict[str, int]
    phase: str
    module: str
    loaded_bytes: int
    peaks: dict[str, int]
    reserved_bytes: int
    allocated_bytes: int
    trained: int
    parameters: int
    multiplied: int
    settings: dict[str, Any] = field(default_factory=dict)
    basis: str = "CPU"

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain values."""
        return asdict(self)

    def fits(self, budget_bytes: float) -> bool:
        """Whether the device needs at most ``budget_bytes``."""
        return self.reserved_bytes <= budget_bytes

    def rows(self) -> list[tuple[str, int]]:
        """The items, the largest first, with small ones joined."""
        rows = sorted(self.items.items(), key=lambda row: -row[1])
        small = sum(size for _, size in rows if size < _MINOR * self.peak_bytes)
        rows = [row for row in rows if row[1] >= _MINOR * self.peak_bytes]
        return [*rows, ("other", small)] if small else rows

    def bar(self, width: int = _BAR_WIDTH) -> str:
        """The rows as one line of signs; ``legend`` has the sign of each row."""
        sizes = [size for _, size in self.rows()]
        ends = [round(width * sum(sizes[: i + 1]) / self.peak_bytes) for i in range(len(sizes))]
        parts = zip(ends, [0, *ends], strict=False)
        return "".join(_sign(i) * (end - start) for i, (end, start) in enumerate(parts))

    def chart(self) -> Stack:
        """The peak as a stacked bar for ``peftkit.report_page``, with the memory of the card, or of this machine, as a line."""
        from peftkit.planning.picture import chart

        return chart(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with the stacked bar and the numbers. The page is one file and loads nothing.

        Raises:
            OSError: The file cannot be written.
        """
        from peftkit.planning.picture import write_plan

        write_plan(self, path)

    def to_image(self, path: str | os.PathLike[str]) -> None:
        """Write the stacked bar as a picture: ``.svg``, or ``.png``, which needs matplotlib.

        Raises:
            ContractError: The name has another ending, or matplotlib is missing.
            OSError: The file cannot be written.
        """
        from peftkit.report_page import write_chart

        write_chart(self.chart(), path)

    def __str__(self) -> str:
        """A table with one row for each item, and a stacked bar."""
        name = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, False))
        lines = [f"plan: {name}", self.bar()]
        for i, (row, size) in enumerate(self.rows()):
            share = size / self.peak_bytes
            lines.append(f"{_sign(i)} {row:<32} {size_text(size):>11} {share:>6.1%}")
        where = f", {self.module}" if self.module else ""
        lines.append(f"  {'peak':<32} {size_text(self.peak_bytes):>11}  in the {self.phase}{where}")
        if self.reserved_bytes != self.peak_bytes:
            lines.append(f"  {'taken by the allocator':<32} {size_text(self.reserved_bytes):>11}")
        lines.append(f"  {'before the first step':<32} {size_text(self.loaded_bytes):>11}")
        share = self.trained / self.parameters
        lines.append(
            f"trained {self.trained:,} of {self.parameters:,} parameters ({share:.3%}); basis: {self.basis}"
        )
        return "\n".join(lines)


def _sign(index: int) -> str:
    return _SIGNS[index % len(_SIGNS)]


def size_text(size: float) -> str:
    """Bytes in a unit that suits them: ``"1.50 GiB"``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
