"""The memory of a training step before anything is loaded, and settings that fit into a given memory."""

from peftkit.planning.planner import plan
from peftkit.planning.result import MemoryPlan
from peftkit.planning.search import Fit, Option, fit

__all__ = ["Fit", "MemoryPlan", "Option", "fit", "plan"]
