"""What pruning did to each layer, and what the model lost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

REPORT = "prune.json"
"""The report, in the folder of the pruned adapter or model."""


@dataclass(frozen=True)
class PrunedLayer:
    """One layer.

    Attributes:
        name: Name of the module.
        before: Rank before, or share of zeros before.
        after: Rank now, or share of zeros now.
        energy: Share of the squared norm of the update or weight that is kept.
        error: Norm of what was lost divided by the norm before, with the rounding of what was written.
    """

    name: str
    before: float
    after: float
    energy: float
    error: float


@dataclass
class PruneReport:
    """What ``prune`` did.

    Attributes:
        source: What was pruned.
        out: The new folder.
        setting: The argument that says how much, such as ``"rank=8"``.
        layers: The layers that were pruned.
        kept: Layers that were not pruned, with the reason.
        numbers_before: Numbers in the pruned layers that were not zero, or in their factors.
        numbers_after: The same now.
        before: Metrics before pruning, if they were measured.
        after: Metrics of what was written.
    """

    source: str
    out: str
    setting: str
    layers: list[PrunedLayer]
    kept: dict[str, str] = field(default_factory=dict)
    numbers_before: int = 0
    numbers_after: int = 0
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)

    def worst(self) -> PrunedLayer:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        worst = self.worst()
        lines = [
            f"{self.setting}: {len(self.layers)} layers, {self.numbers_before:,} numbers before, {self.numbers_after:,} now",
            f"largest error: {worst.error:.3g} of the norm, in {worst.name}",
        ]
        reasons: dict[str, int] = {}
        for reason in self.kept.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"kept: {number} ({reason})" for reason, number in reasons.items()]
        for name, value in (self.after or {}).items():
            lines.append(f"{name}: {(self.before or {})[name]:.4g} before, {value:.4g} now")
        return "\n".join(lines)
