"""The loss on data of the pretraining's kind, before and after an adaptation: what the model has forgotten."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.stages.recipe import StagedRecipe

_LANGUAGE = ("causal_lm", "sft", "masked_lm", "seq2seq", "span_corruption")


def source_values(recipe: Recipe, data: Any, task: Any) -> dict[str, Any]:
    """The keys of the recipe that measures the source data.

    Args:
        recipe: The recipe that is compared; for stages, that of the last one with the first model.
        data: Rows, as ``data.train``.
        task: Name or keys of the task whose loss is measured. ``None``: the recipe's own if it is one of language models, otherwise the one
            with which models of this kind are pretrained.
    """
    given = {"name": task} if isinstance(task, str) else task
    if given is None:
        own = recipe.task.name
        given = recipe.task.to_dict() if own in _LANGUAGE else {"name": _pretraining_task(recipe)}
    seq_len = recipe.training.seq_len
    training = {"batch_size": recipe.training.batch_size, "seed": recipe.training.seed}
    return {
        "model": recipe.model,
        "base": recipe.base,
        "task": given,
        "data": {"train": data},
        "training": training | ({} if seq_len is None else {"seq_len": seq_len}),
        "out": f"{recipe.out}-source",
    }


def _pretraining_task(recipe: Recipe) -> str:
    from transformers import AutoConfig, AutoModelForMaskedLM

    from peftkit.finetune.model import place_of

    place, gguf = place_of(recipe.model)
    config = AutoConfig.from_pretrained(place, **({} if gguf is None else {"gguf_file": gguf}))
    if config.is_encoder_decoder:
        return "span_corruption"
    return "masked_lm" if type(config) in AutoModelForMaskedLM._model_mapping else "causal_lm"


def source_losses(
    values: Mapping[str, Any], trained: Recipe | StagedRecipe | None
) -> dict[str, float]:
    """The loss of the source data with the pretrained model, and with the body or adapter of a finished run in it.

    Args:
        values: The recipe of the source data.
        trained: The recipe of the finished run; ``None`` measures the pretrained model alone.

    Returns:
        ``source_before``, and ``source_after`` if there is a run.

    Raises:
        ContractError: The pretrained model has no head for the task of the source data, or the weights do not fit.
    """
    from peftkit.finetune.model import load_model
    from peftkit.finetune.reading import build_recipe
    from peftkit.finetune.setup import make_task, resolved

    recipe = build_recipe(values)
    assert isinstance(recipe, Recipe)
    task = make_task(recipe)
    recipe = resolved(recipe, task)
    if isinstance(trained, StagedRecipe):
        trained = trained.stages[-1].recipe
    model: Any = load_model(recipe, task, is_adapter=True)
    task.setting.config = model.config
    _require_head(model, recipe)
    found = {"source_before": _loss(recipe, task, model)}
    if trained is not None:
        model = _with_training(model, trained, recipe.model)
        found["source_after"] = _loss(recipe, task, model)
    return found


def _require_head(model: Any, recipe: Recipe) -> None:
    new = [
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter, "_is_hf_initialized", False) is not True
    ]
    if new:
        raise ContractError(
            f"the source data needs a pretrained model for {recipe.task.name}, but {recipe.model} has no weights for {new[0]}; name another "
            "source task, or leave the source data out"
        )


def _with_training(model: Any, trained: Recipe, original: str) -> Any:
    """The model with what a run has trained in its body."""
    from peftkit.finetune.start import copy_body, start_from_adapter
    from peftkit.finetune.strategies import AdapterSetting, require_strategy
    from peftkit.finetune.weights import ADAPTER, MODEL

    strategy = require_strategy(trained.strategy.name)
    folder = Path(trained.out)
    if not strategy.is_adapter:
        copy_body(_loaded(str(folder / MODEL)), model)
        return model
    if trained.model != original:
        copy_body(_loaded(trained.model), model)
    prepared = strategy.apply(model, trained.strategy.options, AdapterSetting()).model
    start_from_adapter(prepared, str(folder / ADAPTER), [])
    return prepared


def _loaded(place: str) -> Any:
    """The model in a folder with the class that wrote it."""
    from peftkit.base import load_base

    return load_base(place)


def _loss(recipe: Recipe, task: Any, model: Any) -> float:
    from transformers import set_seed

    from peftkit.finetune.data import encode_rows
    from peftkit.finetune.trainer import make_trainer

    rows = encode_rows(recipe.data.train, "source", recipe, task).model_rows()
    set_seed(recipe.training.seed)
    with tempfile.TemporaryDirectory() as scratch:
        training = dataclasses.replace(recipe.training, best_metric="last")
        measured = dataclasses.replace(recipe, training=training)
        trainer = make_trainer(measured, task, model, None, rows, scratch)
        return float(trainer.evaluate()["eval_loss"])
