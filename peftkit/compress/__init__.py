"""Make a trained adapter or model smaller: lower ranks of a LoRA, zeros in the weights of a model."""

from peftkit.compress.pruning import prune
from peftkit.compress.report import PruneReport

__all__ = ["PruneReport", "prune"]
