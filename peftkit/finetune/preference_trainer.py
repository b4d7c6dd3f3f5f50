"""TRL's ``DPOTrainer`` in a run: the same parameter groups, checks and folder as with transformers' Trainer.

``RecipeTrainer`` calls every method that it overrides with ``super()``, and both it and ``DPOTrainer`` are subclasses of ``Trainer``.
A class with both as bases therefore runs ours first, then TRL's, then the Trainer's, and no code is needed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from peftkit.errors import ContractError
from peftkit.finetune.trainer import RecipeTrainer, make_arguments


class _NamedEvaluation(Trainer):
    """Keeps the task's metrics of what TRL measures in an evaluation, under the prefix of the evaluation. TRL's is always ``eval_``.

    It is a base after ``DPOTrainer``, whose ``log`` adds TRL's metrics and passes all of them on.
    """

    task: Any
    own_names: set[str]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write an entry of the log."""
        if not self.model.training:
            prefix = next(n.removesuffix("loss") for n in self.own_names if n.endswith("_loss"))
            for name in [name for name in logs if name not in self.own_names]:
                metric, value = name.removeprefix("eval_"), logs.pop(name)
                if metric in self.task.metric_names:
                    logs[prefix + metric] = value
        super().log(logs, start_time)


class PreferenceTrainer(RecipeTrainer, DPOTrainer, _NamedEvaluation):
    """The trainer of the task ``preference``.

    Args:
        model: The model.
        reference: The frozen reference. ``None``: the model with its adapter disabled.
        train_dataset: Encoded rows; ``None`` for an evaluation.
        eval_dataset: Encoded rows.
    """

    def __init__(
        self,
        model: Any,
        *,
        reference: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        given = reference
        if reference is None:
            # Without any reference TRL would add a copy of the adapter, which would be saved with it.
            given = torch.nn.Module()
            given.config = model.config
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        try:
            super().__init__(
                model,
                ref_model=given,
                train_dataset=eval_dataset if train_dataset is None else train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ContractError(
                f"TRL's DPOTrainer refuses this model: {' '.join(str(error).split())}"
            ) from error
        # TRL rounds an adapter on a quantised base to bfloat16, but PEFT loads a checkpoint of it in float32, as all other tasks train it.
        for parameter, values in trained.items():
            parameter.data = values
        if reference is None:
            self.ref_model = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write an entry of the log, with TRL's metrics."""
        self.own_names = set(logs)
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are encoded already."""
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes its own model card."""


def make_config(options: Any, settings: dict[str, Any]) -> Any:
    """Build TRL's arguments from the task's options and the fields of ``TrainingArguments``.

    Raises:
        ContractError: transformers or TRL refuse them.
    """
    own = {"beta": options.beta, "loss_type": [options.loss], "max_length": None}
    # TRL's default is True.
    return make_arguments(DPOConfig, {"gradient_checkpointing": False, **settings, **own})
