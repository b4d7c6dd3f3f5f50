"""Turn plain data into dataclasses, strictly: an unknown key, a wrong type or a number out of range is an error with a way out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from peftkit.errors import ContractError, short

Built = TypeVar("Built")

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def key(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a key of a recipe.

    Args:
        default: Value of a recipe without the key. Without a default the key is required. A list or dict is copied.
        help: One line for the recipe that ``peftkit train --init`` writes, and for errors.
        least: Smallest number that is allowed.
        most: Largest number that is allowed.
        above: The number must be larger.
        below: The number must be smaller.
    """
    metadata = {"help": help, "least": least, "most": most, "above": above, "below": below}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[Built], values: Any, where: str = "") -> Built:
    """Build a dataclass from a mapping with exactly its keys.

    Args:
        cls: A dataclass whose fields were declared with ``key``, or a config of PEFT.
        values: A mapping from key to value.
        where: The dotted key of the mapping itself, for messages: ``"training"``. Empty for the recipe.

    Raises:
        ContractError: A key is unknown or missing, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise ContractError(
            f"{where or 'the recipe'}={short(values)} is {_kind(values)}; it must have keys, such as {_example(cls)}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    before = f"{where}." if where else ""
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ContractError(unknown_key(f"{before}{name}", value, fields, before))
        given[name] = _value(value, hints[name], f"{before}{name}", fields[name].metadata)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in given:
            if dataclasses.is_dataclass(hints[name]):
                given[name] = build(hints[name], {}, f"{before}{name}")  # type: ignore[arg-type]
                continue
            explained = field.metadata.get("help", "")
            raise ContractError(
                f"the recipe has no {before}{name}; add it"
                + (f" ({explained[:1].lower()}{explained[1:]})" if explained else "")
            )
    return cls(**given)


def unknown_key(name: str, value: Any, known: Collection[str], before: str = "") -> str:
    """The message for a key that does not exist: the key, its value, the nearest keys and all keys."""
    last = name.rpartition(".")[2]
    return (
        f"{name}={short(value)}: there is no such key{nearest(last, known, before)}; the keys here are "
        f"{', '.join(f'{before}{other}' for other in known)}"
    )


def nearest(word: str, known: Collection[str], before: str = "") -> str:
    """Return ``"; did you mean 'training.lr'?"``, or nothing if no known word is similar."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(before + name) for name in close)}?" if close else ""


def _example(cls: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls)[:3])


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "a mapping", bool: "true or false"}
    if value is None:
        return "empty"
    return names.get(type(value)) or _WORDS.get(type(value)) or f"of type {type(value).__name__}"


def _value(value: Any, hint: Any, name: str, limits: Mapping[str, Any]) -> Any:
    found = _converted(value, hint, name)
    if found is _WRONG:
        words = _choices(hint)
        if words and isinstance(value, (str, bool)) and not isinstance(value, Mapping):
            raise ContractError(
                f"{name}={short(value)} is unknown{nearest(str(value), words)}; use {_wanted(hint)}"
            )
        raise ContractError(
            f"{name}={short(value)} is {_kind(value)}; it must be {_wanted(hint)}{_hint_at_text(value, hint)}"
        )
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        _check_limits(found, name, limits)
    return found


def _hint_at_text(value: Any, hint: Any) -> str:
    texts = hint is str or str in typing.get_args(hint)
    if texts and isinstance(value, (int, float)):
        return f'; put it in quotes: "{value}"'
    return ""


_WRONG = object()


def _converted(value: Any, hint: Any, name: str) -> Any:
    """Return the value as ``hint`` says, or ``_WRONG``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for arm in sorted(inner, key=lambda arm: arm is float):
            found = _converted(value, arm, name)
            if found is not _WRONG:
                return found
        return _WRONG
    if origin is typing.Annotated:
        return _converted(value, inner[0], name)
    if hint is Any or isinstance(hint, (typing.TypeVar, typing.ForwardRef)):
        return value
    if hint is type(None):
        return None if value is None else _WRONG
    if origin is typing.Literal:
        return (
            value if any(value == word and type(value) is type(word) for word in inner) else _WRONG
        )
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, name)  # type: ignore[arg-type]
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return _list(value, origin or hint, inner, name)
    if origin is dict or hint is dict:
        return _dict(value, inner, name)
    if hint is float:
        return _float(value)
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG
    if hint in (str, bool):
        return value if isinstance(value, hint) else _WRONG
    return value if isinstance(hint, type) and isinstance(value, hint) else _WRONG


def _list(value: Any, kind: Any, inner: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, (list, tuple, set)):
        return _WRONG
    if not inner:
        return kind(value)
    found = []
    for index, entry in enumerate(value):
        one = _converted(entry, inner[0], f"{name}[{index}]")
        if one is _WRONG:
            raise ContractError(
                f"{name} has the entry {short(entry)}, which is {_kind(entry)}; entries must be {_wanted(inner[0])}"
            )
        found.append(one)
    return kind(found)


def _dict(value: Any, inner: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, Mapping):
        return _WRONG
    for entry, one in value.items():
        if inner and (
            _converted(entry, inner[0], name) is _WRONG or _converted(one, inner[1], name) is _WRONG
        ):
            raise ContractError(
                f"{name} has the entry {short(entry)}: {short(one)}; entries must be {_wanted(inner[0])}: {_wanted(inner[1])}"
            )
    return dict(value)


def _float(value: Any) -> Any:
    # YAML reads 1e-4 as text, because it wants a dot before the exponent.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _WRONG
    try:
        found = float(value)
    except ValueError:
        return _WRONG
    return found if math.isfinite(found) else _WRONG


def _check_limits(value: float, name: str, limits: Mapping[str, Any]) -> None:
    least, most, above, below = (limits.get(limit) for limit in ("least", "most", "above", "below"))
    wanted = []
    if least is not None:
        wanted.append(f"at least {least:g}")
    if most is not None:
        wanted.append(f"at most {most:g}")
    if above is not None:
        wanted.append(f"above {above:g}")
    if below is not None:
        wanted.append(f"below {below:g}")
    fits = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        raise ContractError(f"{name}={value:g} is out of range; it must be {' and '.join(wanted)}")


def _choices(hint: Any) -> list[Any]:
    """The words of each ``Literal`` in a type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(inner)
    return [word for arm in inner for word in _choices(arm)]


def _wanted(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        arms = [_wanted(arm) for arm in inner if arm is not type(None)]
        if type(None) in inner:
            arms.append("null")
        return " or ".join(dict.fromkeys(arms))
    if origin is typing.Literal:
        return " or ".join(repr(word) for word in inner)
    if origin in (list, set, tuple):
        return f"a list of {_wanted(inner[0])}" if inner else "a list"
    if origin is dict or hint is dict:
        return "a mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
