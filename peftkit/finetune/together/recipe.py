"""A recipe with several adapters: each has its own task, rows and training, and all share one frozen model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.schema import unknown_key

_OWN_KEYS = ("task", "strategy", "data", "training")
_TOP_KEYS = ("model", "base", *_OWN_KEYS, "adapters", "out", "resume")
_ONE_MODEL = ("precision", "gradient_checkpointing")
"""Keys of ``training`` that say how the shared model computes."""


@dataclass
class AdaptersRecipe:
    """A run of several adapters that are trained together, checked.

    Attributes:
        model: The model that all share.
        base: As for ``peftkit.load_base``.
        adapters: For each name the recipe of a run of its own, in its own folder.
        out: The folder of the run.
        resume: Continue the run in ``out``.
    """

    model: str
    base: str
    adapters: dict[str, Recipe]
    out: str
    resume: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, which ``read_recipe`` reads again; each adapter has all its keys."""
        adapters = {}
        for name, recipe in self.adapters.items():
            written = recipe.to_dict()
            adapters[name] = {key: written[key] for key in _OWN_KEYS}
        return {"model": self.model, "base": self.base, "adapters": adapters, "out": self.out}


def build_adapters(
    values: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Recipe]
) -> AdaptersRecipe:
    """Build a recipe with several adapters.

    Args:
        values: The recipe. What is outside ``adapters`` is the default of every adapter.
        build: Builds and checks the recipe of one adapter.

    Raises:
        ContractError: A key is unknown or has a wrong value, or the adapters cannot share a model. The message names the adapter.
    """
    for name, value in values.items():
        if name not in _TOP_KEYS:
            raise ContractError(unknown_key(str(name), value, _TOP_KEYS))
    given = values["adapters"]
    if not isinstance(given, Mapping) or len(given) < 2:
        raise ContractError(
            f"adapters={short(given)} must have two or more adapters by their names, such as adapters: {{first: {{data: ...}}, second: "
            "{data: ...}}; a recipe with one adapter is written without adapters"
        )
    found: dict[str, Recipe] = {}
    for name, own in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ContractError(
                f"adapters has the name {short(name)}, which is the name of a folder too; use letters, digits, - and _"
            )
        try:
            recipe = build(_with_defaults(values, own, f"adapters.{name}"))
        except ContractError as error:
            raise ContractError(f"adapter {name}: {error}") from error
        found[name] = dataclasses.replace(recipe, out=str(Path(recipe.out) / name))
    first = next(iter(found.values()))
    for name, recipe in found.items():
        for key in _ONE_MODEL:
            one, other = getattr(first.training, key), getattr(recipe.training, key)
            if one != other:
                raise ContractError(
                    f"adapter {name}: training.{key}={short(other)}, but {next(iter(found))} has {short(one)}, and they share one model; use "
                    "the same value"
                )
    return AdaptersRecipe(first.model, first.base, found, str(Path(first.out).parent), first.resume)


def _with_defaults(values: Mapping[str, Any], own: Any, where: str) -> dict[str, Any]:
    """The keys of one adapter with the defaults of the recipe."""
    if not isinstance(own, Mapping):
        raise ContractError(
            f"{where}={short(own)} has no keys; it must have {', '.join(_OWN_KEYS)}"
        )
    for name, value in own.items():
        if name not in _OWN_KEYS:
            raise ContractError(unknown_key(f"{where}.{name}", value, _OWN_KEYS, f"{where}."))
    merged = {name: values[name] for name in ("model", "base", "out", "resume") if name in values}
    for name in _OWN_KEYS:
        default, mine = _mapping(values.get(name)), _mapping(own.get(name))
        if (
            mine is None
            or default is None
            or not isinstance(default, dict)
            or not isinstance(mine, dict)
        ):
            chosen = default if mine is None else mine
        elif name in ("task", "strategy") and mine.get("name", default.get("name")) != default.get(
            "name"
        ):
            # Options of another task or method are none of this one.
            chosen = mine
        else:
            if name == "training" and {"epochs", "max_steps"} & mine.keys():
                # The length of an adapter's training replaces the default length, in whichever unit.
                default = {k: v for k, v in default.items() if k not in ("epochs", "max_steps")}
            chosen = default | mine
        if chosen is not None:
            merged[name] = chosen
    return merged


def _mapping(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, Mapping) else value
