"""What cannot be trained in several processes, each with the reason and a way out."""

from __future__ import annotations

import os

from peftkit.errors import ContractError
from peftkit.finetune.divided import OPTIMIZERS
from peftkit.finetune.processes import process_count
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.stages.recipe import StagedRecipe
from peftkit.finetune.tasks import require_task
from peftkit.finetune.tasks.base import Task

_LAUNCHERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def require_parallel(recipe: Recipe | StagedRecipe) -> None:
    """Raise if the run has several processes and cannot be divided among them.

    Raises:
        ContractError: The message says why.
    """
    _require_sharding(recipe)
    if process_count() == 1:
        return
    for variable, name in _LAUNCHERS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ContractError(
                f"{variable}={os.environ[variable]!r}, but peftkit train does not work with accelerate's {name}; start it with torchrun, "
                "and use training.fsdp=true and base=nf4 if the model does not fit in one GPU"
            )


def _parts(recipe: Recipe | StagedRecipe) -> list[Recipe]:
    return [one.recipe for one in recipe.stages] if isinstance(recipe, StagedRecipe) else [recipe]


def _require_sharding(recipe: Recipe | StagedRecipe) -> None:
    from peftkit.finetune.setup import is_adapter

    recipes = _parts(recipe)
    if not any(part.training.fsdp for part in recipes):
        return
    if process_count() == 1:
        raise ContractError(
            "training.fsdp=true divides weights among processes, but there is one process; start the run with torchrun, or "
            "leave training.fsdp out"
        )
    for part in recipes:
        if not is_adapter(part):
            _require_divisible(part)


def _require_divisible(recipe: Recipe) -> None:
    """Raise unless the trained weights of a recipe can be divided."""
    optimizer, strategy = recipe.training.optimizer, recipe.strategy.name
    if optimizer not in OPTIMIZERS:
        raise ContractError(
            f"training.fsdp=true divides the weights that strategy={strategy} trains, and training.optimizer={optimizer!r} does not step on parts "
            f"of them; use one of {', '.join(OPTIMIZERS)}, or leave training.fsdp out"
        )
    if require_task(recipe.task.name).trainer is not Task.trainer:
        raise ContractError(
            f"training.fsdp=true with strategy={strategy}: task={recipe.task.name} has a trainer of its own, which needs whole weights; use an "
            "adapter such as lora, or leave training.fsdp out"
        )
    if getattr(recipe.strategy.options, "keep_zeros", False):
        raise ContractError(
            "training.fsdp=true with strategy.keep_zeros=true, which compares whole weights; leave one of them out"
        )
