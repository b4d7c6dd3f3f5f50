"""A recipe with several adapters: each has its own task, rows and training, and all share one frozen model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.defaults import require_keys, require_used, with_defaults
from peftkit.finetune.recipe import Recipe

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
    require_keys(values, _TOP_KEYS)
    given = values["adapters"]
    if not isinstance(given, Mapping) or len(given) < 2:
        raise ContractError(
            f"adapters={short(given)} must have two or more adapters by their names, such as adapters: {{first: {{data: ...}}, second: "
            "{data: ...}}; a recipe with one adapter is written without adapters"
        )
    require_used(values, given.values(), "adapters")
    shared = {name: values[name] for name in ("model", "base", "out", "resume") if name in values}
    found: dict[str, Recipe] = {}
    for name, own in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ContractError(
                f"adapters has the name {short(name)}, which is the name of a folder too; use letters, digits, - and _"
            )
        try:
            recipe = build(shared | with_defaults(values, own, f"adapters.{name}", _OWN_KEYS))
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
