"""Read a recipe from YAML, apply ``key=value`` overrides and check it, before any model or data is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from peftkit.errors import ContractError, count, short
from peftkit.finetune.combinations import check_combinations
from peftkit.finetune.recipe import Choice, DataRecipe, DistillRecipe, Recipe, TrainingRecipe
from peftkit.finetune.schema import build, nearest, unknown_key
from peftkit.finetune.stages.recipe import StagedRecipe, build_stages
from peftkit.finetune.together.recipe import AdaptersRecipe, build_adapters

AnyRecipe = Recipe | StagedRecipe | AdaptersRecipe

KEYS = (
    "model",
    "base",
    "adapter",
    "weights",
    "task",
    "strategy",
    "data",
    "training",
    "distill",
    "stages",
    "adapters",
    "out",
    "resume",
)
_SECTIONS = ("task", "strategy", "data", "training", "distill", "stages", "adapters")


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> AnyRecipe:
    """Read a recipe and check it.

    Args:
        source: A YAML file, or the same keys as a mapping. In a mapping ``data.train`` and ``data.eval`` may be ``datasets.Dataset``
            objects or lists of dictionaries.
        overrides: ``"training.lr=1e-4"``: a dotted key and a value in YAML. Later ones replace earlier ones.

    Returns:
        The recipe, or one with stages or several adapters. Nothing is loaded or written.

    Raises:
        ContractError: The file cannot be read; a key is unknown or missing; a value has the wrong type, is unknown or out of range;
            or keys contradict each other. The message names the key, its value and a way out.
    """
    return build_recipe(recipe_values(source, overrides))


def recipe_values(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> dict[Any, Any]:
    """The keys of a recipe with the overrides applied, before they are checked; as for ``read_recipe``."""
    values = _named(dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source)))
    for override in overrides:
        _apply(values, override)
    return values


def build_recipe(values: Mapping[str, Any]) -> AnyRecipe:
    """Check the keys of a recipe; as for ``read_recipe``."""
    values = _named(dict(values))
    if "stages" in values and "adapters" in values:
        raise ContractError(
            "the recipe has stages and adapters; train the stages first, and name their merged model as model"
        )
    if "adapters" in values:
        return build_adapters(values, _build)
    return build_stages(values, _build) if "stages" in values else _build(values)


def _build(values: Mapping[str, Any]) -> Recipe:
    from peftkit.finetune.strategies import require_strategy
    from peftkit.finetune.tasks import require_task

    for name, value in values.items():
        if name not in KEYS:
            raise ContractError(unknown_key(str(name), value, KEYS))
    base = values.get("base", "auto")
    _require_kind("base", base)
    task_name, task_options = _choice("task", values)
    strategy_name, strategy_options = _choice("strategy", values, "lora")
    recipe = Recipe(
        model=_text("model", values, "the id of a model on the Hub, a folder or a GGUF file"),
        base=base,
        task=Choice(task_name, build(require_task(task_name).Options, task_options, "task")),
        strategy=Choice(
            strategy_name, require_strategy(strategy_name).options(strategy_options, "strategy")
        ),
        data=build(DataRecipe, values.get("data") or {}, "data"),
        training=build(TrainingRecipe, values.get("training") or {}, "training"),
        out=_text("out", values, "the folder of the run"),
        resume=_bool("resume", values.get("resume", False)),
        weights=_weights(values.get("weights", "pretrained")),
        adapter=_text("adapter", values, "the folder of an adapter")
        if values.get("adapter")
        else None,
        distill=_distill(values.get("distill")),
    )
    check_combinations(recipe)
    return recipe


def _choice(section: str, values: Mapping[str, Any], default: str | None = None) -> tuple[str, Any]:
    given = values.get(section)
    if given is None and default is not None:
        return default, {}
    if given is None:
        from peftkit.finetune.tasks import TASKS

        raise ContractError(f"the recipe has no task; add it (one of {', '.join(TASKS)})")
    if not isinstance(given, Mapping):
        raise ContractError(
            f"{section}={short(given)} is of type {type(given).__name__}; give a name, or a mapping with the key name"
        )
    options = dict(given)
    name = options.pop("name", default)
    if not isinstance(name, str):
        raise ContractError(
            f"{section} has no name; write {section}: NAME, or {section}: {{name: NAME, ...}} (it has {', '.join(given) or 'no keys'})"
        )
    return name, options


def _text(name: str, values: Mapping[str, Any], meaning: str) -> str:
    value = values.get(name)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or value == "":
        raise ContractError(f"the recipe has no {name}; add it ({meaning})")
    if not isinstance(value, str):
        raise ContractError(
            f"{name}={short(value)} is of type {type(value).__name__}; it must be text: {meaning}"
        )
    return value


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ContractError(f"{name}={short(value)} must be true or false")
    return value


def _distill(value: Any) -> DistillRecipe | None:
    """The section ``distill``; ``false`` and ``null`` mean none."""
    if value is None or value is False:
        return None
    found = build(DistillRecipe, value, "distill")
    _require_kind("distill.base", found.base)
    return found


def _weights(value: Any) -> str:
    if value not in ("pretrained", "random"):
        raise ContractError(f"weights={short(value)} is unknown; use pretrained or random")
    return value


def _require_kind(name: str, value: Any) -> None:
    from peftkit.base.kinds import Base

    known = get_args(Base)
    if value not in known:
        raise ContractError(
            f"{name}={short(value)} is unknown{nearest(str(value), known)}; use one of {', '.join(known)}"
        )


def _named(values: dict[Any, Any]) -> dict[Any, Any]:
    """Write ``task: sft`` as ``task: {name: sft}``, so that overrides can add options."""
    for section in ("task", "strategy"):
        if isinstance(values.get(section), str):
            values[section] = {"name": values[section]}
    if isinstance(values.get("adapters"), Mapping):
        values["adapters"] = {
            name: _named(dict(own)) if isinstance(own, Mapping) else own
            for name, own in values["adapters"].items()
        }
    return values


def _apply(values: dict[Any, Any], override: str) -> None:
    import yaml

    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ContractError(
            f"{override!r} is no override; write key=value, such as training.lr=1e-4 or out=runs/second"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ContractError(
            f"{override!r}: the value is no YAML ({_one_line(error)}); put text with special characters in quotes"
        ) from None
    if parts[0] not in KEYS:
        raise ContractError(unknown_key(name, value, KEYS))
    if len(parts) == 1:
        values[parts[0]] = value
        _named(values)
        return
    if parts[0] == "stages" and len(parts) < 3:
        raise ContractError(f"{override!r}: write stages.NUMBER.KEY=VALUE, counted from 1")
    if parts[0] == "adapters" and parts[1] not in (values.get("adapters") or {}):
        known = ", ".join(map(str, values.get("adapters") or {})) or "none"
        raise ContractError(
            f"{override!r}: the recipe has no adapter {parts[1]!r} (it has {known})"
        )
    if parts[0] not in _SECTIONS:
        raise ContractError(
            f"{override!r}: {parts[0]} has no keys of its own; write {parts[0]}=VALUE"
        )
    place: Any = values
    for done, part in enumerate(parts[:-1], start=1):
        if isinstance(place, list):
            place = _entry(place, part, override, ".".join(parts[: done - 1]))
            continue
        inner = place.get(part)
        if inner is None:
            inner = {}
        elif isinstance(inner, list) and part == "stages":
            place[part] = [_named(dict(one)) if isinstance(one, Mapping) else one for one in inner]
            place = place[part]
            continue
        elif not isinstance(inner, Mapping):
            before = ".".join(parts[:done])
            raise ContractError(
                f"{override!r}: {before}={short(inner)} has no keys of its own; write {before}=VALUE"
            )
        place[part] = dict(inner)
        place = place[part]
    place[parts[-1]] = value


def _entry(entries: list[Any], part: str, override: str, before: str) -> dict[Any, Any]:
    """A copy of an entry of a list, put in its place; entries are counted from 1."""
    if not part.isdecimal() or not 1 <= int(part) <= len(entries):
        raise ContractError(
            f"{override!r}: {before} has the entries 1 to {len(entries)}; write {before}.1.KEY=VALUE"
        )
    entry = entries[int(part) - 1]
    if not isinstance(entry, Mapping):
        raise ContractError(f"{override!r}: {before}.{part}={short(entry)} has no keys of its own")
    entries[int(part) - 1] = dict(entry)
    return entries[int(part) - 1]


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    if not path.is_file():
        raise ContractError(
            f"recipe {str(path)!r} is no file; `peftkit train --init sft > {path.name or 'recipe.yaml'}` writes one to start from"
        )
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader())
    except UnicodeDecodeError as error:
        raise ContractError(
            f"recipe {path} is not UTF-8 text ({error}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ContractError(f"recipe {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise ContractError(
            f"recipe {path} must have keys such as model:, task: and data:, but it is "
            + ("empty" if found is None else f"of type {type(found).__name__}")
        )
    return found


def _strict_loader() -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuses a mapping that has a key twice, of which YAML would keep the last."""

        def construct_mapping(self, node, deep=False):
            names = [self.construct_object(name, deep=deep) for name, _ in node.value]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {twice[0]!r} is there {count(names.count(twice[0]), 'time')}; keep one of them",
                    node.start_mark,
                )
            return super().construct_mapping(node, deep)

    return StrictLoader


def _one_line(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return " ".join(f"{problem}{place}".split())
