"""Check keys of a recipe against each other, before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from peftkit.errors import ContractError, short
from peftkit.finetune.recipe import DistillRecipe, Recipe

_QUANTISED = ("int8", "nf4", "fp8")

_REPORTING = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""The packages for each entry of ``training.report_to``; one of them is enough."""


def check_combinations(recipe: Recipe) -> None:
    """Raise if keys contradict each other.

    Raises:
        ContractError: The message names the keys, their values and a way out.
    """
    from peftkit.finetune.strategies import require_strategy
    from peftkit.finetune.tasks import require_task

    strategy, task = require_strategy(recipe.strategy.name), require_task(recipe.task.name)
    _check_length(recipe)
    _check_evaluation(recipe, task)
    _check_rates(recipe, strategy)
    _check_smoothing(recipe, task)
    _check_base(recipe, strategy)
    _check_columns(recipe, task)
    _check_places(recipe)
    _check_reporting(recipe)
    _check_start(recipe, strategy)
    _check_distill(recipe, task)
    strategy.check(recipe.strategy.options, recipe)


def _check_length(recipe: Recipe) -> None:
    training = recipe.training
    if training.epochs is not None and training.max_steps is not None:
        raise ContractError(
            f"training.epochs={training.epochs:g} and training.max_steps={training.max_steps} are both given; keep one of them"
        )
    steps = training.max_steps
    if steps is not None and training.warmup >= max(steps, 1) and training.warmup >= 1:
        raise ContractError(
            f"training.warmup={training.warmup:g} steps are not fewer than training.max_steps={steps}, so the learning rate would "
            "never reach training.lr; use a share such as 0.03"
        )
    if steps is not None and training.stop_after is not None and training.stop_after >= steps:
        raise ContractError(
            f"training.stop_after={training.stop_after} is not below training.max_steps={steps}; remove it"
        )


def _check_evaluation(recipe: Recipe, task: type) -> None:
    training, data = recipe.training, recipe.data
    if data.train is None or data.train == "" or data.train == []:
        raise ContractError("the recipe has no data.train; add it (a file, a folder or hub:NAME)")
    share = data.eval
    if isinstance(share, bool) or (isinstance(share, (int, float)) and not 0 < share < 1):
        raise ContractError(
            f"data.eval={short(share)} is no share; use a number between 0 and 1, such as 0.1, or a file"
        )
    # Objects are described by their length in the recipe of a run, so two may have one description.
    if isinstance(share, str) and share == data.train and not share.startswith("<"):
        raise ContractError(
            f"data.eval={short(share)} is the same as data.train, so the evaluation would say nothing; name other rows, or a share "
            "such as 0.1"
        )
    if data.eval is None:
        for name in ("early_stopping", "best_metric"):
            value = getattr(training, name)
            if value not in (None, "last"):
                raise ContractError(
                    f"training.{name}={short(value)} needs an evaluation; add data.eval, such as data.eval=0.1, or remove it"
                )
    known = ("last", "loss", *task.metric_names)  # type: ignore[attr-defined]
    if training.best_metric is not None and training.best_metric not in known:
        from peftkit.finetune.schema import nearest

        raise ContractError(
            f"training.best_metric={short(training.best_metric)} is no metric of {recipe.task.name}"
            f"{nearest(training.best_metric, known)}; use one of {', '.join(known)}"
        )
    if training.best_metric == "last" and training.early_stopping is not None:
        raise ContractError(
            "training.early_stopping needs a metric, but training.best_metric='last'; use loss or another metric"
        )


def _check_rates(recipe: Recipe, strategy: type) -> None:
    training = recipe.training
    ratio = training.lora_plus_ratio
    if ratio is not None and recipe.strategy.name not in ("lora", "mix"):
        raise ContractError(
            f"training.lora_plus_ratio={ratio:g} is for strategy lora, not {recipe.strategy.name}; remove it"
        )
    if ratio is not None and training.layer_decay is not None:
        raise ContractError(
            f"training.lora_plus_ratio={ratio:g} and training.layer_decay={training.layer_decay:g} cannot be combined; keep one"
        )


def _check_smoothing(recipe: Recipe, task: type) -> None:
    share = recipe.training.label_smoothing
    if share and (task.has_own_loss or not task.smooths_labels):  # type: ignore[attr-defined]
        raise ContractError(
            f"training.label_smoothing={share:g} has no effect on the loss of task {recipe.task.name}; remove it"
        )


def _check_base(recipe: Recipe, strategy: type) -> None:
    if recipe.base in _QUANTISED and not strategy.is_adapter:  # type: ignore[attr-defined]
        raise ContractError(
            f"base={recipe.base!r} is quantised and cannot be trained itself, but strategy {recipe.strategy.name} trains it; use "
            "base=auto, or strategy=lora"
        )
    if recipe.base == "fp16":
        from peftkit.finetune.strategies import ADAPTERS

        if recipe.strategy.name not in ADAPTERS:
            raise ContractError(
                f"base='fp16' with strategy {recipe.strategy.name}: updates of fp16 weights round to zero; use base=fp32 (or auto) and "
                "training.precision=bf16"
            )


def _check_columns(recipe: Recipe, task: type) -> None:
    known = task.columns  # type: ignore[attr-defined]
    for name in recipe.data.columns:
        if name not in known:
            from peftkit.finetune.schema import nearest

            raise ContractError(
                f"data.columns.{name}={short(recipe.data.columns[name])}: {recipe.task.name} has no column {name!r}"
                f"{nearest(name, known)}; its columns are {', '.join(known)}. Write TASK_COLUMN: YOUR_COLUMN"
            )


def _check_places(recipe: Recipe) -> None:
    out = Path(recipe.out)
    if out.resolve() in (Path.cwd().resolve(), Path(out.anchor or "/").resolve()):
        raise ContractError(
            f"out={recipe.out!r} is the current or the root folder; name a new folder, such as runs/first"
        )
    for name, place in (("model", recipe.model), ("data.train", recipe.data.train)):
        if (
            isinstance(place, str)
            and Path(place).exists()
            and Path(place).resolve() == out.resolve()
        ):
            raise ContractError(
                f"out={recipe.out!r} is the same folder as {name}; name a new folder"
            )
    for name, source in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for place in source if isinstance(source, list) else [source]:
            if isinstance(place, str) and Path(place).is_dir() and _is_inside(out, Path(place)):
                raise ContractError(
                    f"out={recipe.out!r} is inside {name}={place!r}, so files of the run would be read as rows; name a folder outside"
                )


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_reporting(recipe: Recipe) -> None:
    for name in recipe.training.report_to:
        packages = _REPORTING[name]
        if not any(find_spec(package) for package in packages):
            raise ContractError(
                f"training.report_to={name} needs the package {' or '.join(packages)}: pip install {packages[0]}, or remove it"
            )


def _check_start(recipe: Recipe, strategy: type) -> None:
    if recipe.weights == "random" and recipe.strategy.name != "full":
        raise ContractError(
            f"weights='random' with strategy {recipe.strategy.name}, which would keep random weights frozen for some of the time; use "
            "strategy=full"
        )
    if recipe.adapter is None:
        return
    if not strategy.is_adapter:  # type: ignore[attr-defined]
        raise ContractError(
            f"adapter={short(recipe.adapter)} with strategy {recipe.strategy.name}, which trains no adapter; merge the adapter into a "
            "model first (peftkit merge) and name that as model"
        )
    from peftkit.finetune.start import require_startable

    require_startable(recipe.strategy, f"adapter={short(recipe.adapter)}")


def _check_distill(recipe: Recipe, task: type) -> None:
    distill = recipe.distill
    if distill is None:
        return
    if task.distils is None:  # type: ignore[attr-defined]
        from peftkit.finetune.tasks import TASKS, require_task

        known = [name for name in TASKS if require_task(name).distils is not None]
        raise ContractError(
            f"distill.teacher={short(distill.teacher)}: the task {recipe.task.name} takes no teacher; remove distill, or use one of "
            f"{', '.join(known)}"
        )
    if distill.loss == "hidden":
        _check_hidden(recipe, distill)
    if recipe.training.fsdp:
        raise ContractError(
            f"distill.teacher={short(distill.teacher)} with training.fsdp=true, which divides the student but not the teacher among processes; "
            "leave training.fsdp out, and use base=nf4 and distill.base=nf4 to save memory"
        )
    if distill.teacher == recipe.model and recipe.weights == "pretrained" and not recipe.adapter:
        raise ContractError(
            f"distill.teacher={short(distill.teacher)} is the model that is trained, so it would teach what the model does already; name a "
            "larger model, or a run"
        )


def _check_hidden(recipe: Recipe, distill: DistillRecipe) -> None:
    known = ("sft", "causal_lm", "masked_lm", "token_classification", "text_classification")
    if recipe.task.name not in known:
        raise ContractError(
            f"distill.loss='hidden' with the task {recipe.task.name}; use distill.loss=logits, or one of {', '.join(known)}"
        )
    if distill.temperature is not None:
        raise ContractError(
            f"distill.temperature={distill.temperature:g} has no effect with distill.loss='hidden'; remove it"
        )
    if distill.weight == 1:
        raise ContractError(
            "distill.weight=1 with distill.loss='hidden' would leave the head without a gradient; use a number below 1, such as 0.5"
        )
