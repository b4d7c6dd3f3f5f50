"""What is trained: one registry of strategies, from full fine-tuning to adapters."""

from peftkit.finetune.strategies.registry import (
    ADAPTERS,
    Strategy,
    require_strategy,
    strategy_names,
)

__all__ = ["ADAPTERS", "Strategy", "require_strategy", "strategy_names"]
