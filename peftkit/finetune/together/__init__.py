"""Train several adapters at once over one frozen model: every step computes the rows of all of them in one batch."""

from peftkit.finetune.together.sweeping import Sweep, SweepRow, sweep

__all__ = ["Sweep", "SweepRow", "sweep"]
