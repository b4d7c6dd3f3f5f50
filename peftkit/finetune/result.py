"""The outcome of a run, and what its training needed of the machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.planning.result import MemoryPlan


@dataclass
class RunResult:
    """The outcome of a run.

    Attributes:
        folder: The folder of the run.
        status: ``"finished"``, or ``"stopped"`` after Ctrl-C or ``training.stop_after``.
        steps: Optimiser steps that were done.
        metrics: The evaluation of the saved weights, and the mean of the logged training losses.
        weights: The folder with the adapter or the model; ``None`` if the run was stopped.
        problems: What the checks after training found. A run with problems did not train what it should.
        notes: What is worth knowing besides.
        trained: Number of trained numbers.
    """

    folder: Path
    status: str
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    weights: Path | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trained: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        found = dataclasses.asdict(self)
        return found | {
            "folder": str(self.folder),
            "weights": None if self.weights is None else str(self.weights),
        }


@dataclass
class Usage:
    """Memory and time of a training.

    Attributes:
        plan: The plan of a step; ``None`` if it could not be planned.
        measured_bytes: The most memory that the training added to the loaded model.
        seconds: Time from the first step to the last.
    """

    plan: MemoryPlan | None = None
    measured_bytes: int = 0
    seconds: float = 0.0
