"""What is trained: one registry of strategies, from full fine-tuning to adapters."""

from peftkit.finetune.strategies.base import AdapterSetting, Strategy
from peftkit.finetune.strategies.registry import ADAPTERS, require_strategy, strategy_names

__all__ = ["ADAPTERS", "AdapterSetting", "Strategy", "require_strategy", "strategy_names"]
