"""Check the values of an ``adapter_config.json`` before PEFT uses them, so that errors name the file and the field."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from peftkit.errors import ContractError

_EXPRESSIONS = ("target_modules", "exclude_modules")
_FACTORS = ("lora_alpha", "alpha")
_NOT_SIZES = re.compile(r"alpha|seed|key|step|scal|temperature|indices|tinit|tfinal")
_ALWAYS_PLAUSIBLE = 2**16


def check_values(file: Path, written: dict[str, Any]) -> None:
    """Raise if a rank, a factor, a dropout or a regular expression cannot work in any model.

    Args:
        file: Where the config was read, for the message.
        written: Its content.

    Raises:
        ContractError: A value cannot work. The message names the file, the field and its value.
    """
    for name, rank in _entries(written, "r", "rank_pattern"):
        # OFT writes r=0 if the size of its blocks is given.
        least = 0 if written.get("peft_type") == "OFT" and name == "r" else 1
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < least:
            raise _wrong(file, name, rank, f"a rank is a whole number of at least {least}")
    for factor in _FACTORS:
        for name, value in _entries(written, factor, "alpha_pattern"):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise _wrong(file, name, value, "it is a factor, so the value must be a number")
    for name, value in written.items():
        if not name.endswith("dropout") or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise _wrong(file, name, value, "it is a probability, so the value must be from 0 to 1")
    for name in _EXPRESSIONS:
        value = written.get(name)
        if not isinstance(value, str):
            continue
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise _wrong(
                file,
                name,
                value,
                f"a string must be a regular expression, but this is not a valid one ({error})",
            ) from error


def check_sizes(file: Path, written: dict[str, Any], numbers: int) -> None:
    """Raise if the config asks for tensors that are larger than the whole checkpoint.

    Args:
        file: Where the config was read, for the message.
        written: Its content.
        numbers: Number of elements in all tensors of the checkpoint.

    Raises:
        ContractError: A size is too large. The message names the file, the field and its value.
    """
    for name, value in _integers(written):
        if value > max(numbers, _ALWAYS_PLAUSIBLE) and not _NOT_SIZES.search(name):
            raise _wrong(
                file,
                name,
                value,
                f"the weights have only {numbers} elements in all, so no tensor can have this size",
            )


def largest_size(written: dict[str, Any]) -> int:
    """Return the largest integer in a config that may be a size."""
    return max((v for name, v in _integers(written) if not _NOT_SIZES.search(name)), default=0)


def ranks(written: dict[str, Any]) -> set[int]:
    """Return the ranks in a LoRA config; empty for other methods."""
    if written.get("peft_type") != "LORA":
        return set()
    return {rank for _, rank in _entries(written, "r", "rank_pattern")}


def odd_fields(kind: type, written: dict[str, Any]) -> list[str]:
    """Return the fields whose values do not have the declared type, as ``name=value: PEFT expects type``."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # a type that can only be resolved while type checking
        return []
    return [
        f"{name}={value!r}: PEFT expects {_spelled(hints[name])}"
        for name, value in written.items()
        if name in hints and not _matches(value, hints[name])
    ]


def _entries(written: dict[str, Any], field: str, pattern: str) -> Iterator[tuple[str, Any]]:
    """Yield a field, then the values that a pattern sets for single modules."""
    if field in written:
        yield field, written[field]
    by_module = written.get(pattern)
    if isinstance(by_module, dict):
        for name, value in by_module.items():
            yield f"{pattern}[{name!r}]", value


def _integers(written: dict[str, Any]) -> Iterator[tuple[str, int]]:
    waiting: list[tuple[str, Any]] = list(written.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif isinstance(value, dict):
            waiting.extend((f"{name}[{key!r}]", item) for key, item in value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value)


def _wrong(file: Path, name: str, value: Any, why: str) -> ContractError:
    return ContractError(f"{file}: {name}={value!r}: {why}; correct it, or save the adapter again")


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON can have the declared type. Any value matches a type that is not handled."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return isinstance(value, list)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
