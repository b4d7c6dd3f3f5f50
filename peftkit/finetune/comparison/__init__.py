"""Compare strategies with simpler baselines on the same data, and say when adaptation loses or forgets."""

from peftkit.finetune.comparison.comparing import Comparison, compare

__all__ = ["Comparison", "compare"]
