"""transformers' Trainer for a recipe: its arguments, our parameter groups and callbacks, and a stop at the first NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from peftkit.checks.reach import loss_of, undisturbed
from peftkit.errors import ContractError
from peftkit.find.statistics import hold_statistics, norms_with_statistics
from peftkit.finetune.distillation.parts import LossParts
from peftkit.finetune.divided import WithoutWrapping, groups_of_parts, is_divided
from peftkit.finetune.model import with_decoder_inputs
from peftkit.finetune.processes import any_process, process_count
from peftkit.finetune.rates import parameter_groups
from peftkit.finetune.recipe import Recipe, TrainingRecipe
from peftkit.finetune.saving import CheckedCheckpoints
from peftkit.finetune.smoothing import TaskSmoother
from peftkit.finetune.tasks.base import Task
from peftkit.finetune.zeros import kept_zeros

if TYPE_CHECKING:
    from peftkit.finetune.distillation import Distillation


class RecipeTrainer(CheckedCheckpoints):
    """The Trainer with the task's loss, a recipe's parameter groups and checked checkpoints."""

    distillation: Distillation | None = None
    """The teacher, set before training."""

    tokens_seen: int
    """Tokens in the batches of this process so far, padding included."""

    def __init__(self, *args: Any, task: Task, rates: TrainingRecipe, **kwargs: Any):
        self.task, self.rates = task, rates
        self._parts = LossParts()
        self.tokens_seen = 0
        self.keep_checkpoints = rates.keep_checkpoints
        self.stops_early = rates.early_stopping is not None
        super().__init__(*args, **kwargs)
        if is_divided(self.model):
            self.accelerator.__class__ = WithoutWrapping
        self.norms = norms_with_statistics(self.model)
        if self.label_smoother is not None:
            self.label_smoother = TaskSmoother(rates.label_smoothing, task)
        if task.has_own_loss or not self._model_divides_by_items():
            # Otherwise the Trainer expects the model to divide the loss by the labels of all accumulated batches.
            self.model_accepts_loss_kwargs = False

    def _model_divides_by_items(self) -> bool:
        """Whether the model's loss is divided by the number of labels of all accumulated batches.

        The Trainer believes so if the model takes any keyword, but ResNet and others ignore this one. Their gradients would be too large
        by the number of accumulated batches, and by that of the processes.
        """
        batches = self.args.gradient_accumulation_steps * process_count()
        if batches == 1 or self.train_dataset is None or not self.model_accepts_loss_kwargs:
            return True
        rows: Any = self.train_dataset
        with undisturbed(self.model), torch.no_grad():
            self.model.eval()
            batch = self._prepare_inputs(self.data_collator([rows[0]]))
            if "labels" not in batch:
                return True  # another trainer computes the loss
            few, many = (
                loss_of(self.model, {**batch, "num_items_in_batch": torch.tensor(items)})
                for items in (8, 16)
            )
        return bool(many < 0.75 * few)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser that the recipe names, with our parameter groups."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            self.optimizer = cls(groups_of_parts(groups_of(self.model, self.rates)), **options)
            zeros = kept_zeros(self.model)
            if zeros is not None:
                zeros.hold(self.optimizer)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The task's own loss if it has one. Frozen batch norms use their statistics and keep them."""
        if model.training:
            hold_statistics(self.norms)
        if self.label_smoother is not None:
            inputs = with_decoder_inputs(self.model, inputs)  # smoothing takes the labels away
        if self.distillation is not None and model.training:
            return self._distilled(model, inputs, return_outputs, **kwargs)
        if not self.task.has_own_loss:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = self.task.loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _distilled(
        self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any = None
    ) -> Any:
        """The loss with the teacher's part. Both parts are divided by the same number of labels.

        An evaluation has the loss of the labels alone, which can be compared with that of other runs.
        """
        assert self.distillation is not None
        batch = dict(inputs)  # label smoothing takes the labels out of the inputs
        own, outputs = super().compute_loss(
            model,
            {**inputs, **self.distillation.more_inputs},
            True,
            num_items_in_batch=num_items_in_batch,
        )
        taught, items = self.distillation.loss(outputs, batch)
        share = 1.0
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            items = num_items_in_batch
            if self.args.average_tokens_across_devices:
                # The labels are those of all processes, whose gradients will be averaged.
                taught = taught * self.accelerator.num_processes
        else:
            share /= self.current_gradient_accumulation_steps
        taught = taught / items
        self._parts.add(own * share, taught * share, self.state.global_step)
        loss = self.distillation.mix(own, taught)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write an entry of the log; with a teacher, the two parts of the training loss too."""
        if self._parts.began is not None and "loss" in logs:
            logs = logs | self._parts.take(self.state.global_step)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Keep of each batch what the task counts or what the model writes, if it does; the outputs of all rows would not fit in memory."""
        task = self.task
        if not task.has_own_counts and not task.writes_in_evaluation:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss.detach(), None, None
            if task.has_own_counts:
                predictions, labels = task.counted(inputs, outputs)
            else:
                predictions, labels = task.written(self.model, inputs), inputs["labels"]
        return loss.detach(), predictions, labels

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the same random choices each time, so that losses can be compared. Some dropout is always on, as in SpeechT5."""
        before, self.task.round = self.task.round, -1
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                return super().evaluate(*args, **kwargs)
        finally:
            self.task.round = before

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raise ``ContractError`` if the loss is not finite, instead of going on with broken weights."""
        ids = args[1].get("input_ids")
        self.tokens_seen += ids.numel() if isinstance(ids, torch.Tensor) else 0
        loss = super().training_step(*args, **kwargs)
        finite = bool(torch.isfinite(loss))
        if any_process(not finite):
            step = self.state.global_step + 1
            raise ContractError(
                f"the loss is {'not finite in another process' if finite else loss.item()} at step {step}, so training stopped; checkpoints of earlier steps are kept in "
                f"{self.args.output_dir}. Use a smaller training.lr, more training.warmup, or training.precision=fp32"
            )
        return loss


def groups_of(model: Any, training: TrainingRecipe) -> list[dict[str, Any]]:
    """The parameter groups of a resolved recipe."""
    return parameter_groups(
        model,
        lr=training.lr or 0.0,
        head_lr=training.head_lr or 0.0,
        weight_decay=training.weight_decay,
        layer_decay=training.layer_decay,
        lora_plus_ratio=training.lora_plus_ratio,
    )


def make_trainer(
    recipe: Recipe, task: Task, model: Any, train: Any, evaluation: Any, folder: str
) -> RecipeTrainer:
    """Build the trainer of a resolved recipe.

    Raises:
        ContractError: The optimiser is unknown, or bf16 is asked for and cannot be used.
    """
    training = recipe.training
    steps = total_steps(recipe, len(train))[0] if train is not None else 0
    settings = _settings(recipe, evaluation is not None, steps, folder)
    settings["label_names"] = list(task.label_names)
    if settings["load_best_model_at_end"]:
        metric = training.best_metric or "loss"
        settings["greater_is_better"] = metric not in task.lower_is_better
    other = task.trainer(recipe, settings)
    if other is not None:
        trainer_class, parts = other
    else:
        trainer_class = RecipeTrainer
        parts = {
            "args": make_arguments(TrainingArguments, settings),
            "compute_metrics": None if evaluation is None else _metrics(task, evaluation),
            "preprocess_logits_for_metrics": task.keep_of_logits,
        }
    with _may_be_quantised(model) if train is None else nullcontext():
        trainer = trainer_class(
            model,
            task=task,
            rates=training,
            data_collator=task.collate,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[EarlyStoppingCallback(training.early_stopping)]
            if training.early_stopping
            else [],
            **parts,
        )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(recipe.out) / "tensorboard")
    return trainer


@contextmanager
def _may_be_quantised(model: Any) -> Iterator[None]:
    """The Trainer takes a quantised model without adapters, which it refuses to train: evaluating it is fine."""
    mark = "_hf_peft_config_loaded"
    before = getattr(model, mark, False)
    setattr(model, mark, True)
    try:
        yield
    finally:
        setattr(model, mark, before)


def _metrics(task: Task, rows: Any) -> Any:
    if not task.metric_names:
        return None

    def compute(prediction: Any) -> dict[str, float]:
        return task.scores(rows, prediction.predictions, prediction.label_ids)

    return compute


def _settings(recipe: Recipe, evaluates: bool, steps: int, folder: str) -> dict[str, Any]:
    """The fields of ``TrainingArguments`` for a resolved recipe."""
    training = recipe.training
    every = training.checkpoint_every
    strategy = "epoch" if every == "epoch" else "steps"
    best = evaluates and training.best_metric != "last"
    metric = training.best_metric or "loss"
    settings: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": training.epochs or 1.0,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size or training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.lr,
        "optim": training.optimizer,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": _warmup(training, steps),
        "label_smoothing_factor": training.label_smoothing,
        "bf16": training.precision == "bf16" or (training.precision == "auto" and _has_bf16()),
        "save_strategy": strategy,
        "eval_strategy": strategy if evaluates else "no",
        # The Trainer would remove old checkpoints before the new one is known to be complete.
        "save_total_limit": None,
        "load_best_model_at_end": best,
        "metric_for_best_model": f"eval_{metric}" if best else None,
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,
        "report_to": training.report_to if steps else [],  # an evaluation alone reports nothing
        "run_name": recipe.out,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_num_workers": training.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "seed": training.seed,
        # All processes must draw the same order, although their dropout has other seeds.
        "data_seed": training.seed,
    }
    if process_count() > 1:
        # Which parameters a batch uses can change: frozen stages, experts.
        settings["ddp_find_unused_parameters"] = True
        settings["ddp_backend"] = None if torch.cuda.is_available() else "gloo"
    if strategy == "steps":
        settings |= {"save_steps": every, "eval_steps": every}
    if training.gradient_checkpointing:
        settings |= {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    _require_optimizer(training.optimizer)
    return settings


def make_arguments(cls: Any, settings: dict[str, Any]) -> Any:
    """Build ``TrainingArguments`` or a subclass.

    Raises:
        ContractError: transformers refuses them.
    """
    try:
        return cls(**settings)
    except (ValueError, ImportError) as error:
        raise ContractError(
            f"transformers refuses these settings of the recipe's training: {' '.join(str(error).split())}"
        ) from error


def _warmup(training: TrainingRecipe, steps: int) -> int:
    """Steps of the warm-up. The Trainer would round a share up, and train with a rate of 0 in the only step of a short run."""
    if training.scheduler == "constant":
        return 0
    return int(training.warmup if training.warmup >= 1 else training.warmup * steps)


def _require_optimizer(name: str) -> None:
    from transformers.training_args import OptimizerNames

    from peftkit.finetune.schema import nearest

    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise ContractError(
            f"training.optimizer={name!r} is unknown{nearest(name, known)}; use one that transformers has, such as adamw_torch, "
            "adafactor, sgd or paged_adamw_8bit"
        )


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def total_steps(recipe: Recipe, samples: int) -> tuple[int, int]:
    """The number of optimiser steps of the run and of an epoch, as the Trainer counts them."""
    training = recipe.training
    batches = math.ceil(math.ceil(samples / training.batch_size) / process_count())
    epoch = max(1, math.ceil(batches / training.gradient_accumulation))
    if training.max_steps:
        return training.max_steps, epoch
    return max(1, math.ceil((training.epochs or 1.0) * epoch)), epoch
