"""Recipes with several parts, stages or adapters: what is outside the parts is the default of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.schema import unknown_key

_NAMED = ("task", "strategy")
"""Keys whose value is a name, or a name with options."""

_LENGTHS = ("epochs", "max_steps")


def require_keys(values: Mapping[str, Any], known: Collection[str], before: str = "") -> None:
    """Raise a ``ContractError`` if a key is not known. ``before`` is what the message writes before the key."""
    for name, value in values.items():
        if name not in known:
            raise ContractError(unknown_key(f"{before}{name}", value, known, before))


def with_defaults(
    values: Mapping[str, Any], own: Any, where: str, known: Collection[str]
) -> dict[str, Any]:
    """The keys of one part, with those of the recipe where the part has none.

    The options of a task or strategy are defaults of the same one alone. The length of a part's training replaces the default length, in
    whichever unit.

    Args:
        values: The recipe.
        own: The part.
        where: The name of the part in messages.
        known: The keys that a part may have.

    Raises:
        ContractError: The part is no mapping, or has an unknown key.
    """
    if not isinstance(own, Mapping):
        raise ContractError(f"{where}={short(own)} has no keys; it must have {', '.join(known)}")
    require_keys(own, known, f"{where}.")
    merged = {name: _value(name, values, own) for name in known}
    return {name: value for name, value in merged.items() if value is not None}


def require_used(values: Mapping[str, Any], parts: Collection[Any], what: str) -> None:
    """Raise a ``ContractError`` if no part uses a default, so that it says nothing. ``what`` names the parts: ``"stages"``."""
    for name in (*_NAMED, "distill"):
        if name in values and all(
            isinstance(own, Mapping) and _value(name, values, own) == _value(name, {}, own)
            for own in parts
        ):
            raise ContractError(
                f"{name}={short(values[name])} is the default of the {what}, but each of them has its own {name}; remove it"
            )


def _value(name: str, values: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """The value of a key in a part with the defaults ``values``; ``None`` if there is none."""
    if name == "distill" and name in own:
        return own[name]  # null: without a teacher
    default, mine = values.get(name), own.get(name)
    if name in _NAMED:
        default, mine = (
            {"name": value} if isinstance(value, str) else value for value in (default, mine)
        )
    if mine is None or default is None:
        return default if mine is None else mine
    if not isinstance(default, Mapping) or not isinstance(mine, Mapping):
        return mine
    if name in _NAMED and mine.get("name", default.get("name")) != default.get("name"):
        return mine
    if name == "training" and mine.keys() & set(_LENGTHS):
        default = {key: value for key, value in default.items() if key not in _LENGTHS}
    return {**default, **mine}
