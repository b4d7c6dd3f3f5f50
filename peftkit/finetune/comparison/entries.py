"""What a comparison runs: the pretrained model, a linear probe, training from scratch, and each strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.reading import build_recipe
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.stages.recipe import StagedRecipe
from peftkit.finetune.strategies import require_strategy
from peftkit.finetune.together.recipe import AdaptersRecipe

BASELINES = ("pretrained", "probe", "scratch")


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    Attributes:
        name: Name in the table, and of the folder of its run.
        kind: ``"pretrained"``, ``"probe"``, ``"scratch"``, ``"strategy"`` or ``"stages"``.
        values: The keys of its recipe.
        partner: The name of the row that differs only in the stages before the last one.
    """

    name: str
    kind: str
    values: dict[str, Any]
    partner: str | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this is no strategy of the user."""
        return self.kind in BASELINES


def make_entries(values: Mapping[str, Any], strategies: Sequence[Any]) -> list[Entry]:
    """The rows of a comparison, each with a checked recipe.

    Args:
        values: The keys of the recipe.
        strategies: Names of strategies, or mappings with ``name``, options and perhaps ``lr``.

    Raises:
        ContractError: The recipe or a strategy is wrong, or there is no evaluation.
    """
    recipe = comparable(values)
    last = _last_alone(values, recipe)
    out = Path(recipe.out)
    own = recipe.stages[-1].recipe if isinstance(recipe, StagedRecipe) else recipe
    if own.data.eval is None:
        raise ContractError(
            "a comparison needs an evaluation; add data.eval, such as data.eval=0.1"
        )
    found = [
        Entry("pretrained", "pretrained", last | {"out": str(out / "pretrained")}),
        Entry("probe", "probe", _with_strategy(last, {"name": "partial"}, out / "probe")),
        Entry(
            "scratch",
            "scratch",
            _with_strategy(last, {"name": "full"}, out / "scratch") | {"weights": "random", "base": "auto"},
        ),
    ]  # fmt: skip
    taken = {entry.name for entry in found}
    for given in strategies:
        strategy = _strategy(given, own)
        name = str(strategy["name"])
        number = 2
        while name in taken:
            name, number = f"{strategy['name']}-{number}", number + 1
        taken.add(name)
        found.append(Entry(name, "strategy", _with_strategy(last, strategy, out / name)))
        if isinstance(recipe, StagedRecipe):
            longer = f"stages, {name}"
            place = out / f"stages-{name}"
            found.append(Entry(longer, "stages", _in_stages(values, strategy, place), name))
    if len(found) == 3:
        raise ContractError("strategies=[]: name at least one, such as full,lora")
    for entry in found:
        try:
            build_recipe(entry.values)
        except ContractError as error:
            raise ContractError(f"{entry.name}: {error}") from error
    return found


def comparable(values: Mapping[str, Any]) -> Recipe | StagedRecipe:
    """The checked recipe of a comparison.

    Raises:
        ContractError: The recipe is wrong, or has several adapters.
    """
    recipe = build_recipe(values)
    if isinstance(recipe, AdaptersRecipe):
        raise ContractError(
            "a recipe with adapters cannot be compared as a whole; compare the recipe of one adapter"
        )
    return recipe


def _last_alone(values: Mapping[str, Any], recipe: Recipe | StagedRecipe) -> dict[str, Any]:
    """The keys of the last stage as a recipe of its own; those of a recipe without stages as they are."""
    if isinstance(recipe, Recipe):
        return {name: value for name, value in values.items() if name != "resume"}
    last = recipe.stages[-1].recipe
    written = recipe.as_first(len(recipe.stages) - 1).to_dict()
    # Rows that were passed as objects are only described in the written recipe.
    written["data"] |= {"train": last.data.train, "eval": last.data.eval}
    return written


def _strategy(given: Any, own: Recipe) -> dict[str, Any]:
    """The keys of a strategy: the recipe's own options for its own strategy, and one block more for ``partial``."""
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return dict(given)
    if not isinstance(given, str) or not given:
        raise ContractError(
            f"strategies has the entry {short(given)}; write a name, or {{name: NAME, ...}}"
        )
    require_strategy(given)
    if given == own.strategy.name:
        return own.strategy.to_dict()
    # The head alone is the probe.
    return {"name": given, "last_blocks": 1} if given == "partial" else {"name": given}


def _with_strategy(
    values: Mapping[str, Any], strategy: dict[str, Any], out: Path
) -> dict[str, Any]:
    strategy = dict(strategy)
    training = dict(values.get("training") or {})
    if "lr" in strategy:
        training["lr"] = strategy.pop("lr")
    found = dict(values) | {"strategy": strategy, "training": training, "out": str(out)}
    if not require_strategy(strategy["name"]).is_adapter:
        found.pop("adapter", None)
        if found.get("base") in ("int8", "nf4", "fp8", "fp16"):
            # Weights that are trained themselves cannot be quantised.
            found["base"] = "auto"
        training.pop("lora_plus_ratio", None)
    return found


def _in_stages(values: Mapping[str, Any], strategy: dict[str, Any], out: Path) -> dict[str, Any]:
    """The recipe with the strategy in every stage."""
    strategy = dict(strategy)
    lr = strategy.pop("lr", None)
    stages = []
    for stage in values["stages"]:
        own = {name: value for name, value in stage.items() if name not in ("strategy", "carry")}
        if lr is not None:
            own["training"] = dict(own.get("training") or {}) | {"lr": lr}
        stages.append(own)
    kept = {name: value for name, value in values.items() if name != "resume"}
    return kept | {"stages": stages, "strategy": strategy, "out": str(out)}
