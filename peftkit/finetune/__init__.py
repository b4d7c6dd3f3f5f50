"""Fine-tuning from a recipe: data, task, strategy, run and report, on transformers' Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.finetune.comparison import Comparison, compare
    from peftkit.finetune.reading import read_recipe
    from peftkit.finetune.recipe import Recipe
    from peftkit.finetune.result import RunResult
    from peftkit.finetune.together.sweeping import Sweep, sweep
    from peftkit.finetune.training import train
    from peftkit.finetune.using import evaluate, generate

__all__ = [
    "Comparison",
    "Recipe",
    "RunResult",
    "Sweep",
    "compare",
    "evaluate",
    "generate",
    "read_recipe",
    "sweep",
    "train",
]

_HOME_OF = {
    "Comparison": "comparison",
    "compare": "comparison",
    "Recipe": "recipe",
    "RunResult": "result",
    "evaluate": "using",
    "generate": "using",
    "read_recipe": "reading",
    "Sweep": "together.sweeping",
    "sweep": "together.sweeping",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
