"""What a sweep varies: keys of the recipe with several values, and the recipes of all combinations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.reading import build_recipe
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.schema import nearest

VARYING = (
    "training.lr",
    "training.head_lr",
    "training.layer_decay",
    "training.lora_plus_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.scheduler",
    "training.warmup",
    "training.label_smoothing",
    "training.optimizer",
)
"""Keys that may differ, besides those of the strategy. Others decide which rows a step has, or how the shared model computes."""

_MOST = 64


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        name: The name of its folder, such as ``"r=8,lr=0.001"``.
        values: The keys that vary, with the values of this run.
        recipe: Its recipe.
    """

    name: str
    values: dict[str, Any]
    recipe: Recipe


def read_over(given: Mapping[str, Iterable[Any]] | Iterable[str]) -> dict[str, list[Any]]:
    """The keys that vary and their values.

    Args:
        given: ``{"strategy.r": [4, 8]}``, or texts such as ``"strategy.r=4,8"`` with values in YAML.

    Raises:
        ContractError: A text is no ``KEY=VALUE,VALUE``, or a key may not vary or has no two different values.
    """
    found: dict[str, list[Any]] = {}
    if isinstance(given, str):
        given = [given]
    pairs = given.items() if isinstance(given, Mapping) else [_read(text) for text in given]
    for name, values in pairs:
        if name in found:
            raise ContractError(f"over: {name} is given twice; give its values once, with commas")
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise ContractError(f"over: {name}={short(values)} is no list of values")
        found[name] = list(values)
        _check(name, found[name])
    if not found:
        raise ContractError("over is empty; give at least one key, such as strategy.r=4,8,16")
    return found


def _read(text: str) -> tuple[str, list[Any]]:
    import yaml

    name, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise ContractError(
            f"over={text!r} has no values; write KEY=VALUE,VALUE, such as strategy.r=4,8,16"
        )
    try:
        return name.strip(), yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        raise ContractError(
            f"over={text!r}: the values are no list in YAML; put text with special characters in quotes"
        ) from None


def _check(name: str, values: list[Any]) -> None:
    known = ("strategy.OPTION", *VARYING)
    is_option = name.startswith("strategy.") and name != "strategy.name"
    if not is_option and name not in VARYING:
        raise ContractError(
            f"over: {name} cannot vary in a sweep{nearest(name, VARYING)}; use {', '.join(known)}. Other keys decide which rows a step has, "
            "or how the shared model computes: run peftkit train for each value"
        )
    if len(values) < 2 or any(a == b for a, b in itertools.combinations(values, 2)):
        raise ContractError(f"over: {name}={short(values)} must have two or more different values")


def variants(values: Mapping[str, Any], over: Mapping[str, list[Any]]) -> list[Variant]:
    """The recipes of all combinations of the values.

    Args:
        values: The keys of the recipe.
        over: From ``read_over``.

    Raises:
        ContractError: A combination is no recipe that a sweep can run. The message names it.
    """
    found = []
    for chosen in itertools.product(*over.values()):
        own = dict(zip(over, chosen, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={_text(value)}" for key, value in own.items())
        try:
            recipe = build_recipe(_with(values, own))
            if not isinstance(recipe, Recipe):
                raise ContractError(
                    "a sweep has neither stages nor adapters; sweep the recipe of one of them"
                )
        except ContractError as error:
            raise ContractError(f"{name}: {error}") from error
        found.append(Variant(name, own, recipe))
    names = [variant.name for variant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ContractError(
            f"over: two runs would have the name {twice[0]!r}; use values with other texts"
        )
    if len(found) > _MOST:
        raise ContractError(
            f"over has {len(found)} combinations, and every one needs its rows in the batch; use at most {_MOST}"
        )
    return [placed(variant) for variant in found]


def placed(variant: Variant) -> Variant:
    """The variant with its own folder inside that of the sweep."""
    import dataclasses

    out = str(Path(variant.recipe.out) / variant.name)
    return dataclasses.replace(variant, recipe=dataclasses.replace(variant.recipe, out=out))


def _with(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name, value in own.items():
        section, _, key = name.partition(".")
        inner = found.get(section) or {}
        inner = {"name": inner} if isinstance(inner, str) else dict(inner)
        place: Any = inner
        *path, last = key.split(".")
        for part in path:
            place[part] = dict(place.get(part) or {})
            place = place[part]
        place[last] = value
        found[section] = inner
    return found


def _text(value: Any) -> str:
    """A value as a part of the name of a folder."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "_", text) or "empty"
