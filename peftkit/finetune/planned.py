"""The memory plan of a run, made before its first step."""

from __future__ import annotations

from typing import Any

from peftkit.finetune.recipe import Recipe
from peftkit.finetune.setup import is_adapter
from peftkit.finetune.trainer import RecipeTrainer
from peftkit.planning import MemoryPlan, plan
from peftkit.planning.optimizers import TRAINER_NAMES

_OPTIMIZERS = {name: own for own, name in TRAINER_NAMES.items()} | {"adamw_bnb_8bit": "adamw_8bit"}
"""The names of optimisers in ``plan``, by their names in transformers."""


def plan_of_run(
    recipe: Recipe, task: Any, trainer: Any, train: Any
) -> tuple[MemoryPlan | None, str]:
    """Plan a step with a batch of the longest training rows.

    The model stays as it is. The plan takes less time than a step.

    Returns:
        The plan and an empty text, or ``None`` and the reason why there is no plan.
    """
    optimizer = _OPTIMIZERS.get(recipe.training.optimizer)
    if optimizer is None:
        return None, f"training.optimizer={recipe.training.optimizer} cannot be planned"
    if task.has_own_loss or type(trainer) is not RecipeTrainer:
        return None, f"the loss of the task {recipe.task.name} cannot be planned"
    if trainer.distillation is not None:
        size = trainer.distillation.teacher.size_bytes() / 2**20
        return (
            None,
            f"a step with a teacher cannot be planned (its weights alone are {size:.1f} MiB)",
        )
    if recipe.training.fsdp:
        return None, "the memory of divided weights cannot be planned"
    if trainer.args.bf16:
        return None, "mixed precision cannot be planned"
    rows = _longest(train.dataset, recipe.training.batch_size)
    model = trainer.model
    method = () if is_adapter(recipe) and hasattr(model, "peft_config") else ("partial",)
    try:
        made = plan(
            model,
            *method,
            batch=task.collate(rows),
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            checkpointing=recipe.training.gradient_checkpointing,
            device="cpu" if trainer.args.device.type == "cpu" else "cuda",
        )
    except Exception as error:
        # a model that plan cannot run must not stop a training that works
        return None, " ".join(str(error).split())[:200]
    made.settings.update(
        method=recipe.strategy.name,
        base=recipe.base,
        batch_size=len(rows),
        seq_len=max((len(row["input_ids"]) for row in rows if "input_ids" in row), default=None),
    )
    return made, ""


def _longest(dataset: Any, count: int) -> list[dict[str, Any]]:
    """The longest rows; the first ones if rows have no tokens."""
    numbers = range(len(dataset))
    if "input_ids" in dataset.column_names:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        numbers = sorted(numbers, key=lambda i: -lengths[i])
    return list(dataset.select(list(numbers)[:count]))
