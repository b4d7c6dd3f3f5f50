"""The parts of a run before its first step: data, model, strategy and the default values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from peftkit.errors import ContractError, count
from peftkit.find.statistics import hold_statistics, norms_with_statistics
from peftkit.finetune.data import Part, find_labels, load_data
from peftkit.finetune.first_step import check_first_step
from peftkit.finetune.model import load_model, load_processor, longest_input
from peftkit.finetune.processes import process_count
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.sharding import shard
from peftkit.finetune.start import start_from_adapter
from peftkit.finetune.strategies import AdapterSetting, require_strategy
from peftkit.finetune.tasks import require_task
from peftkit.finetune.tasks.base import TOKEN_COLUMNS, Setting, Task
from peftkit.finetune.trainer import total_steps

SCRATCH_LR = 5e-4
"""Learning rate of random weights if the recipe has none."""


def is_adapter(recipe: Recipe) -> bool:
    """Whether the recipe trains an adapter rather than the model itself."""
    return require_strategy(recipe.strategy.name).is_adapter


def resolved(recipe: Recipe, task: Task) -> Recipe:
    """Fill in the defaults that depend on the task and the strategy."""
    training, strategy = recipe.training, require_strategy(recipe.strategy.name)
    epochs = None if training.max_steps else training.epochs or task.epochs
    lr = training.lr or (SCRATCH_LR if recipe.weights == "random" else strategy.lr) * task.lr_share
    return dataclasses.replace(
        recipe,
        training=dataclasses.replace(
            training,
            lr=lr,
            head_lr=training.head_lr or max(lr, strategy.head_lr),
            epochs=epochs,
            eval_batch_size=training.eval_batch_size or training.batch_size,
            seq_len=task.setting.seq_len,
            best_metric=training.best_metric or (task.best_metric if recipe.data.eval else None),
        ),
    )


def make_task(recipe: Recipe, labels: list[str] | None = None) -> Task:
    """Load the tokenizer and make the task; the labels are found in the training data unless they are known."""
    task_class = require_task(recipe.task.name)
    processor = load_processor(recipe, task_class.processor)
    has_tokenizer = task_class.processor in ("image and text", "speech and text")
    tokenizer = processor.tokenizer if has_tokenizer else processor
    if labels is None:
        labels = find_labels(recipe, task_class)
    seq_len = recipe.training.seq_len or task_class.seq_len
    config = config_of(recipe)
    if recipe.training.seq_len is None:
        longest = getattr(tokenizer, "model_max_length", None)
        seq_len = min(seq_len, longest) if isinstance(longest, int) and longest > 1 else seq_len
        seq_len = min(seq_len, longest_input(SimpleNamespace(config=config)) or seq_len)
    setting = Setting(
        tokenizer, seq_len, recipe.task.options, labels, config, seed=recipe.training.seed
    )
    setting.processor = None if tokenizer is processor else processor
    return task_class(setting)


def config_of(recipe: Recipe) -> Any:
    """The config of the model, before its weights are loaded."""
    from transformers import AutoConfig

    from peftkit.finetune.model import place_of

    place, gguf = place_of(recipe.model)
    options = {} if gguf is None else {"gguf_file": gguf}
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(
            f"model={recipe.model!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error


def repeated_notes(evaluation: Part | None) -> list[str]:
    """A note if rows of the evaluation are training rows."""
    if evaluation is None or not evaluation.counts.repeated:
        return []
    rows = count(
        evaluation.counts.repeated,
        "sample of the evaluation is a training sample",
        "samples of the evaluation are training samples",
    )
    return [f"{rows} too, so its metrics are better than those of new data"]


def prepare_data(recipe: Recipe, say: Callable[[str], None]) -> tuple[Task, Part, Part | None]:
    """Load and encode the data and show samples of it.

    Raises:
        ContractError: The data cannot be used.
    """
    task = make_task(recipe)
    train, evaluation = load_data(recipe, task)
    for name, part in (("train", train), ("eval", evaluation)):
        if part is None:
            continue
        counts = part.counts
        say(
            f"{name}: {count(counts.used, 'row')} of {counts.read}, {count(counts.samples, 'sample')}, "
            f"{counts.supervised} supervised labels, {counts.truncated} truncated, {counts.masked} fully masked, "
            f"{len(counts.bad)} bad"
        )
        for line in counts.bad[:5]:
            say(f"  skipped {line}")
        for note in repeated_notes(part):
            say(f"  {note}")
    for features in train.dataset.select(range(min(recipe.data.preview, len(train.dataset)))):
        say(f"sample: {task.render(dict(features))}")
    return task, train, evaluation


def prepare_model(
    recipe: Recipe, task: Task, train: Part, say: Callable[[str], None]
) -> tuple[Any, list[tuple[int, set[str]]] | None, list[str]]:
    """Load the model, apply the strategy and check the first step.

    Raises:
        ContractError: The model does not fit the task, the strategy or the length of the rows, or would not train.
    """
    return adapt_model(recipe, task, train, load_base_model(recipe, task, train), say)


def load_base_model(recipe: Recipe, task: Task, train: Part) -> Any:
    """Load the model and check that the rows fit it.

    Raises:
        ContractError: The model cannot be loaded, or does not fit the task or the rows.
    """
    model: Any = load_model(recipe, task, require_strategy(recipe.strategy.name).is_adapter)
    texts = ("tokenizer", "image and text", "speech and text")
    longest = longest_input(model) if task.processor in texts else None
    if longest is not None and task.setting.seq_len > longest:
        raise ContractError(
            f"training.seq_len={task.setting.seq_len}, but {type(model).__name__} has positions for {longest} tokens; use at most that "
            "many"
        )
    require_vocabulary(model, task, train)
    return model


def adapt_model(
    recipe: Recipe, task: Task, train: Part, model: Any, say: Callable[[str], None]
) -> tuple[Any, list[tuple[int, set[str]]] | None, list[str]]:
    """Apply the strategy to a loaded model and check the first step.

    Raises:
        ContractError: The model does not fit the task or the strategy, or would not train.
    """
    strategy = require_strategy(recipe.strategy.name)
    task.setting.config = model.config
    rows = first_rows(recipe, train)
    setting = AdapterSetting(task.task_type, tuple(task.outside_loss(model, rows)))
    prepared = strategy.apply(model, recipe.strategy.options, setting)
    model = prepared.model
    name = type(model).__name__
    carried = []
    if recipe.adapter is not None:
        carried = start_from_adapter(model, recipe.adapter, task.setting.labels)
    if recipe.training.fsdp:
        carried.append(shard(model, strategy.is_adapter))
    task.check_model(model, rows)
    if process_count() > 1:
        # All processes have loaded the same frozen weights: DistributedDataParallel need not send them, and cannot if they are float8 or divided.
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        model._ddp_params_and_buffers_to_ignore = frozen
    stages = None
    if prepared.stages is not None:
        stages = prepared.stages(*total_steps(recipe, len(train.dataset)))
    model.train()
    hold_statistics(norms_with_statistics(model))
    batch = task.first_batch(rows)
    notes = carried + check_first_step(model, batch, strategy.is_adapter, own_loss(task))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{name}: {trained:,} trained numbers; {'; '.join(notes)}")
    return model, stages, notes


def first_rows(recipe: Recipe, train: Part) -> list[dict[str, Any]]:
    """The first training rows, as many as a batch has."""
    rows = train.dataset.select(range(min(recipe.training.batch_size, len(train.dataset))))
    return [dict(row) for row in rows]


def own_loss(task: Task) -> Callable[[Any, Any], Any] | None:
    """The task's own loss of a model and a batch, or ``None`` if the model computes it."""
    return (lambda m, batch: task.loss(m, batch)[0]) if task.has_own_loss else None


def require_vocabulary(model: Any, task: Task, train: Part) -> None:
    """Raise if a training row or the padding has a token id that the embeddings do not have."""
    columns = [name for name in TOKEN_COLUMNS if name in train.dataset.column_names]
    if not columns:
        return
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        rows = getattr(embeddings, "num_embeddings", None)
    except NotImplementedError:  # models with several kinds of inputs, such as CLIP
        rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    largest = max(max(map(max, train.dataset[name])) for name in columns)
    largest = max(largest, task.setting.tokenizer.pad_token_id)
    if largest >= rows:
        raise ContractError(
            f"the tokenizer makes the token id {largest}, but the model's embeddings have {rows} rows; the two belong to different "
            "models, or model.resize_token_embeddings was not called before the model was saved"
        )
