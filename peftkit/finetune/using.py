"""Use a finished run: generate text with it, or evaluate it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.data import encode_rows, fingerprint, load_data
from peftkit.finetune.model import load_model
from peftkit.finetune.reading import read_recipe
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import DATA, RECIPE, RESULT, RunFolder
from peftkit.finetune.setup import is_adapter, make_task
from peftkit.finetune.stages.recipe import StagedRecipe
from peftkit.finetune.tasks.base import BadRow, Task
from peftkit.finetune.together.recipe import AdaptersRecipe
from peftkit.finetune.weights import ADAPTER, MODEL


def generate(
    run: str | os.PathLike[str],
    prompts: Sequence[str] = (),
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    images: Sequence[Any] = (),
    audio: Sequence[str] = (),
) -> list[str]:
    """Answer prompts with the model of a finished run, or write down recordings.

    Args:
        run: The folder of the run.
        prompts: One or more prompts; the run's task puts them in the chat format.
        max_new_tokens: Largest number of tokens of an answer.
        temperature: 0 takes the most probable token each time.
        images: Images that every prompt is about, for tasks with images: paths, or images of Pillow.
        audio: Paths of recordings, instead of prompts, for tasks with recordings. Each has an answer.

    Raises:
        ContractError: The run is not finished, its task writes no text or takes no images or recordings, a file cannot be read, or a number
            is out of range.
    """
    from peftkit.finetune.tasks import TASKS, require_task

    recipe, folder = open_run(run)
    if not require_task(recipe.task.name).generative:
        writing = [name for name in TASKS if require_task(name).generative]
        raise ContractError(
            f"the run in {run} has the task {recipe.task.name}, which writes no text; generate is for {', '.join(writing)}. Use peftkit "
            "eval"
        )
    hears = require_task(recipe.task.name).answers_audio
    if hears and (prompts or not audio):
        raise ContractError(
            f"the task {recipe.task.name} answers recordings, not prompts; give at least one with --audio FILE, and no prompt"
        )
    if audio and not hears:
        raise ContractError(
            f"the task {recipe.task.name} takes no recordings, but {len(audio)} were given; remove them"
        )
    if not hears and not (prompts and all(isinstance(p, str) and p.strip() for p in prompts)):
        raise ContractError(
            f"prompts={list(prompts)!r}: give at least one prompt, none of them empty"
        )
    if max_new_tokens < 1:
        raise ContractError(f"max_new_tokens={max_new_tokens} is below 1; use a number such as 128")
    if not temperature >= 0:
        raise ContractError(f"temperature={temperature} is negative; use 0 or a number such as 0.7")
    _require_images(recipe.task.name, len(images))
    task, model = load_run(recipe, folder)
    answers = []
    for asked in audio or prompts:
        if hears:
            ids, context = _prompt_of_audio(task, asked)
        elif images:
            ids, context = task.prompt_with_images(asked, _stored(images))
        else:
            ids, context = task.prompt_of_text(asked), {}
        answers.append(task.answer(model, ids, max_new_tokens, temperature, context))
    return answers


def _prompt_of_audio(task: Task, path: str) -> tuple[list[int], dict[str, Any]]:
    try:
        return task.prompt_of_audio(str(path))
    except BadRow as error:
        raise ContractError(str(error)) from error


def _require_images(name: str, number: int) -> None:
    """Raise ``ContractError`` unless the task takes so many images."""
    from peftkit.finetune.tasks import require_task

    if number and not require_task(name).answers_images:
        raise ContractError(
            f"the task {name} takes no images, but {number} were given; remove them"
        )
    if not number and require_task(name).answers_images:
        raise ContractError(
            f"the task {name} answers prompts about images; give at least one with --image FILE"
        )


def _stored(images: Sequence[Any]) -> list[str]:
    from peftkit.finetune.images import stored_image

    try:
        return [stored_image(image, "image") for image in images]
    except BadRow as error:
        raise ContractError(str(error)) from error


def evaluate(run: str | os.PathLike[str], data: Any = None) -> dict[str, float]:
    """Evaluate the model of a finished run.

    Args:
        run: The folder of the run.
        data: Rows to evaluate on, as ``data.eval`` of a recipe. Default: those of the run's recipe.

    Returns:
        The loss and the task's metrics.

    Raises:
        ContractError: The run is not finished, there is nothing to evaluate on, or the rows cannot be used.
    """
    return evaluate_weights(run, data, None)


def evaluate_weights(
    run: str | os.PathLike[str], data: Any, weights: Path | None
) -> dict[str, float]:
    """Evaluate other weights in the place of those of a finished run, such as pruned ones.

    Args:
        run: As for ``evaluate``.
        data: As for ``evaluate``.
        weights: The folder of an adapter or model of the same kind as that of the run. ``None``: those of the run.
    """
    import tempfile

    from peftkit.finetune.trainer import make_trainer

    recipe, folder = open_run(run)
    source = recipe.data.eval if data is None else data
    if source is None:
        raise ContractError(
            f"the run in {run} had no data.eval; name rows to evaluate on with --data FILE"
        )
    if isinstance(source, str) and source.startswith("<"):
        raise ContractError(
            f"the run in {run} was evaluated on an object ({source}), which is not stored; name rows with --data FILE"
        )
    task, model = load_run(recipe, folder, weights)
    if isinstance(source, float):
        train, evaluation = load_data(recipe, task)
        if fingerprint(train.dataset) != (folder.read_json(DATA) or {}).get("fingerprint"):
            raise ContractError(
                f"the rows of data.train={recipe.data.train!r} are not those of the run in {run}, so the share that was set aside is not "
                "known; name rows with --data FILE"
            )
        rows = evaluation.dataset if evaluation else None
    else:
        rows = encode_rows(source, "data.eval", recipe, task).model_rows()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(recipe, task, model, None, rows, scratch)
        return metrics_of(trainer.evaluate())


def metrics_of(found: dict[str, float]) -> dict[str, float]:
    """The loss and the task's metrics of what the Trainer's evaluation returns."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in found.items()
        if name.startswith("eval_") and not name.endswith(("_time", "runtime", "per_second"))
    }


def open_run(run: str | os.PathLike[str]) -> tuple[Recipe, RunFolder]:
    """Read the recipe of a finished run; of its last stage, if it has stages.

    Raises:
        ContractError: There is no run, or it is not finished.
    """
    folder = RunFolder(run)
    file = folder.path / RECIPE
    if not file.is_file():
        raise ContractError(
            f"run={str(run)!r} is no run of peftkit train (it has no {RECIPE}); name the folder given as out in the recipe"
        )
    status = (folder.read_json(RESULT) or {}).get("status")
    if status != "finished":
        raise ContractError(
            f"the run in {folder.path} is not finished ({status}); continue it with peftkit train {file} resume=true"
        )
    recipe = read_recipe(file)
    if isinstance(recipe, AdaptersRecipe):
        folders = [str(folder.path / name) for name in recipe.adapters]
        raise ContractError(
            f"the run in {folder.path} has several adapters; name the folder of one: {', '.join(folders)}"
        )
    if isinstance(recipe, StagedRecipe):
        return open_run(folder.path / Path(recipe.stages[-1].recipe.out).name)
    return recipe, folder


def weights_of(source: str | os.PathLike[str]) -> str:
    """The folder of the weights of a finished run, or ``source`` as it is if it is no folder of a run.

    Raises:
        ContractError: The run is not finished, or has several adapters.
    """
    if not (Path(source) / RECIPE).is_file():
        return os.fspath(source)
    run = open_run(source)[1].path
    return str(next(p for p in (run / ADAPTER, run / MODEL, run) if p.is_dir()))


def load_run(recipe: Recipe, folder: RunFolder, weights: Path | None = None) -> tuple[Task, Any]:
    """Load the task and the trained model of a run, in evaluation mode; ``weights`` as for ``evaluate_weights``."""
    labels = (folder.read_json(DATA) or {}).get("labels") or []
    task = make_task(recipe, labels)
    if is_adapter(recipe):
        from peftkit.loading import load_adapter

        model = load_model(recipe, task, is_adapter=True)
        model = load_adapter(model, _require(weights or folder.path / ADAPTER))
    else:
        place = str(_require(weights or folder.path / MODEL))
        model = load_model(
            dataclasses.replace(recipe, model=place, weights="pretrained"), task, is_adapter=False
        )
    task.setting.config = model.config
    return task, model.eval()


def _require(path: Path) -> Path:
    if not path.is_dir():
        raise ContractError(f"{path} does not exist; train the run again")
    return path
