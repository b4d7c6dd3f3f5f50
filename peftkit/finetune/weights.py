"""Save the adapter or the model, with its tokenizer and a model card, in a folder that is complete or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peftkit.finetune.model import place_of
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import RunFolder, write_text

ADAPTER, MODEL = "adapter", "model"


def save_weights(
    recipe: Recipe,
    task: Any,
    model: Any,
    folder: RunFolder,
    metrics: dict[str, float],
    facts: dict[str, Any],
    state: dict[str, Any] | None = None,
) -> Path:
    """Write ``adapter`` or ``model`` in the folder of the run.

    Args:
        recipe: The recipe.
        task: The task, which has the tokenizer or the processor.
        model: The trained model.
        folder: The folder of the run.
        metrics: For the model card.
        facts: What ``data.json`` says.
        state: The weights, if the model has only parts of them.

    Returns:
        The folder with the weights.
    """
    from peftkit.finetune.setup import is_adapter

    name = ADAPTER if is_adapter(recipe) else MODEL
    target, partial = folder.path / name, folder.path / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), state_dict=state)
    (task.setting.processor or task.setting.tokenizer).save_pretrained(str(partial))
    write_text(partial / "README.md", model_card(recipe, name, target, metrics, facts))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return target


def model_card(
    recipe: Recipe, name: str, target: Path, metrics: dict[str, float], facts: dict[str, Any]
) -> str:
    """The model card: what was trained on what, with which result, and how it is loaded."""
    import yaml

    from peftkit.environment import describe_environment
    from peftkit.finetune.recipe import batch_text, described

    base = _base_model(recipe.model, target)
    head = {
        "library_name": "peft" if name == ADAPTER else "transformers",
        "base_model": base,
        "tags": ["peftkit", recipe.task.name, recipe.strategy.name],
    }
    environment = describe_environment()
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {Path(recipe.out).name}",
        "",
        f"`{base}`, trained for the task {recipe.task.name} with the strategy {recipe.strategy.name}.",
        "",
        "## Data",
        "",
        f"- training: `{described(recipe.data.train)}`, {facts['train']['used']} rows, {facts['train']['supervised']} supervised labels",
    ]
    if facts["eval"] is not None:
        lines.append(f"- evaluation: `{described(recipe.data.eval)}`, {facts['eval']['used']} rows")
    if facts["labels"]:
        lines.append(f"- labels: {', '.join(facts['labels'])}")
    lines += ["", "## Results", "", "| metric | value |", "|---|---|"]
    lines += [f"| {metric} | {value:.4g} |" for metric, value in metrics.items()]
    training = recipe.training
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    lines += [
        "",
        "## Training",
        "",
        f"{length}, batches of {batch_text(training, facts)}, learning rate {training.lr:g}, "
        f"at most {training.seq_len} tokens, seed {training.seed}.",
        *_teaching(recipe),
        "",
        "## How to load it",
        "",
        "```python",
        *_loading(recipe, facts["labels"], name),
        "```",
        "",
        "## Versions",
        "",
        ", ".join(
            f"{library} {environment[library]}"
            for library in ("peftkit", "torch", "transformers", "peft")
        ),
        "",
    ]
    return "\n".join(lines)


def _teaching(recipe: Recipe) -> list[str]:
    """A sentence about the teacher, if there was one."""
    if recipe.distill is None:
        return []
    spec = recipe.distill
    return [
        f"Distilled from `{spec.teacher}`: {spec.weight:g} of the loss is the distance from its {spec.loss}."
    ]


def _loading(recipe: Recipe, labels: list[str], name: str) -> list[str]:
    """Code that loads the weights."""
    from peftkit.finetune.tasks import require_task

    auto_class = require_task(recipe.task.name).auto_class
    if name == MODEL:
        return [
            f"from transformers import {auto_class}",
            "",
            f'model = {auto_class}.from_pretrained("PATH_OF_THIS_FOLDER")',
        ]
    place, gguf = place_of(recipe.model)
    if gguf is None:
        head = f", num_labels={len(labels)}" if labels else ""
        base = f'model = peftkit.load_base("{place}", auto_class="{auto_class}"{head})'
    else:
        base = f'model = transformers.{auto_class}.from_pretrained("{place}", gguf_file="{gguf}")'
    return [
        "import peftkit" if gguf is None else "import peftkit, transformers",
        "",
        base,
        'model = peftkit.load_adapter(model, "PATH_OF_THIS_FOLDER")',
    ]


def _base_model(model: str, target: Path) -> str:
    """The id on the Hub, or the path relative to the folder of the card."""
    path = Path(model)
    if not path.exists():
        return model
    return os.path.relpath(path.resolve(), target.resolve())
