"""A recipe with stages: how it is read, and where each stage gets its weights from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.defaults import require_keys, require_used, with_defaults
from peftkit.finetune.recipe import Choice, Recipe
from peftkit.finetune.schema import nearest
from peftkit.finetune.weights import ADAPTER, MODEL

CARRIES = ("adapter", "merge", "weights")
MERGED = "merged"
"""The folder, inside that of a stage, with the model into which its adapter was merged."""

_STAGE_KEYS = ("task", "strategy", "data", "training", "distill", "carry")
_TOP_KEYS = ("model", "base", *_STAGE_KEYS[:-1], "stages", "out", "resume")
_UNMERGED = ("bottleneck", "prefix")


@dataclass
class Stage:
    """One stage, checked.

    Attributes:
        recipe: The stage as a run of its own. ``model`` and ``adapter`` are the folders that the stage before it writes.
        carry: What is kept of the stage before: ``"adapter"`` trains its adapter further, ``"merge"`` merges it into the base model,
            ``"weights"`` goes on with a model that was trained itself. ``None`` in the first stage.
    """

    recipe: Recipe
    carry: str | None


@dataclass
class StagedRecipe:
    """A run of several stages, checked.

    Attributes:
        model: Model of the first stage.
        base: As for ``peftkit.load_base``, in every stage.
        stages: The stages in order.
        out: The folder of the run.
        resume: Continue the run in ``out``.
    """

    model: str
    base: str
    stages: list[Stage]
    out: str
    resume: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, which ``read_recipe`` reads again; each stage has all its keys."""
        stages = []
        for stage in self.stages:
            written = stage.recipe.to_dict()
            kept = {name: written[name] for name in _STAGE_KEYS if name in written}
            stages.append(kept | ({"carry": stage.carry} if stage.carry else {}))
        return {"model": self.model, "base": self.base, "stages": stages, "out": self.out}

    def as_first(self, index: int) -> Recipe:
        """A stage as if it were the only one: it starts from the model of the first stage."""
        return dataclasses.replace(self.stages[index].recipe, model=self.model, adapter=None)


def build_stages(
    values: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Recipe]
) -> StagedRecipe:
    """Build a recipe with stages.

    Args:
        values: The recipe. What is outside ``stages`` is the default of every stage.
        build: Builds and checks the recipe of one stage.

    Raises:
        ContractError: A key is unknown or has a wrong value, or a stage cannot go on with what the stage before it has trained. The message
            names the stage.
    """
    require_keys(values, _TOP_KEYS)
    given = values["stages"]
    if not isinstance(given, (list, tuple)) or len(given) < 2:
        raise ContractError(
            f"stages={short(given)} must be a list of two or more stages; a recipe with one stage is written without stages"
        )
    require_used(values, given, "stages")
    out, resume = values.get("out"), values.get("resume", False)
    stages: list[Stage] = []
    for number, own in enumerate(given, start=1):
        name = f"stage {number}"
        try:
            merged = with_defaults(values, own, f"stages.{number}", _STAGE_KEYS)
            merged |= {name: values[name] for name in ("model", "base", "out") if name in values}
            carry = merged.pop("carry", None)
            task = merged.get("task")
            name += f" ({task.get('name')})" if isinstance(task, Mapping) else ""
            recipe = build(merged)
            stages.append(_placed(recipe, carry, stages, number))
        except ContractError as error:
            raise ContractError(f"{name}: {error}") from error
    first = stages[0].recipe
    if not isinstance(resume, bool):
        raise ContractError(f"resume={short(resume)} must be true or false")
    return StagedRecipe(first.model, first.base, stages, str(out), resume)


def _placed(recipe: Recipe, carry: str | None, before: list[Stage], number: int) -> Stage:
    """The stage with its own folder and the weights that it starts from."""
    if carry is not None and carry not in CARRIES:
        raise ContractError(
            f"stages.{number}.carry={short(carry)} is unknown{nearest(str(carry), CARRIES)}; use one of {', '.join(CARRIES)}"
        )
    out = str(Path(recipe.out) / f"{number}-{recipe.task.name}")
    if not before:
        if carry is not None:
            raise ContractError(
                f"stages.1.carry={carry!r}: there is no stage before the first; remove it"
            )
        return Stage(dataclasses.replace(recipe, out=out), None)
    last = before[-1].recipe
    carry = _checked_carry(carry, last.strategy, recipe, f"stages.{number}.carry")
    folder = Path(last.out)
    model, adapter = last.model, None
    if carry == "adapter":
        adapter = str(folder / ADAPTER)
    else:
        model = str(folder / (MERGED if carry == "merge" else MODEL))
    return Stage(dataclasses.replace(recipe, out=out, model=model, adapter=adapter), carry)


def _checked_carry(carry: str | None, last: Choice, recipe: Recipe, where: str) -> str:
    """The way in which weights are carried; raises if it does not fit the two strategies."""
    from peftkit.finetune.start import require_startable
    from peftkit.finetune.strategies import require_strategy

    was_adapter = require_strategy(last.name).is_adapter
    if not was_adapter:
        if carry not in (None, "weights"):
            raise ContractError(
                f"{where}={carry!r}, but the stage before has strategy {last.name}, which trains the model itself and no adapter; use "
                "weights, or remove it"
            )
        return "weights"
    if carry == "weights":
        raise ContractError(
            f"{where}='weights', but the stage before has strategy {last.name}, which trains an adapter; use adapter or merge"
        )
    same = last.to_dict() == recipe.strategy.to_dict()
    if carry == "adapter" and not same:
        raise ContractError(
            f"{where}='adapter', but the strategies differ: {short(last.to_dict())} before, {short(recipe.strategy.to_dict())} now; use "
            "the same strategy and options, or merge"
        )
    if carry is None:
        carry = "adapter" if same else "merge"
    if carry == "adapter":
        require_startable(recipe.strategy, f"{where}={carry!r}")
    else:
        _require_mergeable(last, where)
    return carry


def _require_mergeable(last: Choice, where: str) -> None:
    methods = [last.name]
    if last.name == "mix":
        methods = [name for name in _UNMERGED if getattr(last.options, name) is not None]
    found = [name for name in methods if name in _UNMERGED]
    if found:
        raise ContractError(
            f"{where}='merge', but the stage before trains {' and '.join(found)}, which cannot be merged into weights; use the same "
            "strategy in both stages and carry: adapter, or strategy lora"
        )
