"""Check single values in a config before the model is changed: types, ranges and names."""

from __future__ import annotations

import math
import numbers
import re
import typing
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from torch import nn

from peftkit.errors import ContractError

# Methods whose ``r`` is a number of features. In other methods, zero means that another field sets the size.
_RANKED = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PEFTKIT_MIX"}
_RANKS = ("r", "init_r", "target_r")
_FACTORS = ("lora_alpha", "alpha")
_LISTS = ("modules_to_save", "target_parameters")
_SELECTIONS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")


def check_values(config: Any) -> None:
    """Raise if a field of a ``peft.PeftConfig`` has a value with which no model can be trained.

    Raises:
        TypeError: A value has the wrong type, such as ``r="16"``.
        ValueError: A value is out of range, such as ``lora_dropout=1.0``, or is an unknown word.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if str(getattr(config.peft_type, "value", config.peft_type)) in _RANKED:
        for name in (name for name in _RANKS if name in values):
            require_integer(name, values[name], 1)
    for name in (name for name in _FACTORS if name in values):
        require_factor(name, values[name])
    for name, value in values.items():
        if name.endswith("dropout") and (value is not None or name == "lora_dropout"):
            require_dropout(name, value)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, values.get(name))
    for name in _LISTS:
        _check_names(name, values.get(name), pattern=False)
    for name in _SELECTIONS:
        _check_names(name, values.get(name), pattern=True)
    layers = values.get("layers_to_transform")
    single = isinstance(layers, numbers.Integral) and not isinstance(layers, bool)
    require_integers("layers_to_transform", [layers] if single else layers)
    _check_words(config, values)
    targets = values.get("target_modules")
    if targets is not None and not targets and not values.get("target_parameters"):
        raise ValueError(
            "target_modules is empty, so no module would get an adapter; leave it out to use peftkit's choice, or name modules "
            'such as ["q_proj", "v_proj"]'
        )


def kind_of(value: Any) -> str:
    """Return the type of a value for an error message: ``"an int"``, ``"a str"`` or ``"None"``."""
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"


def require_integer(name: str, value: Any, at_least: int) -> None:
    """Raise unless ``value`` is a whole number, not a bool, of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name}={value!r} is {kind_of(value)}; it must be a whole number, such as {max(at_least, 16)}"
        )
    if value < 0 == at_least:
        raise ValueError(f"{name}={value} is negative; pass 0 or more")
    if value < at_least:
        raise ValueError(
            f"{name}={value} is below {at_least}; pass a number such as {max(at_least, 16)}"
        )


def require_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number, not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is {kind_of(value)}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} is not finite; pass a finite number")


def require_bool(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is {kind_of(value)}; it must be True or False")


def require_integers(name: str, values: Any) -> None:
    """Raise unless ``values`` is None or a collection of whole numbers that are not negative."""
    if values is None:
        return
    if isinstance(values, (str, dict)) or not isinstance(values, Collection):
        raise TypeError(
            f"{name}={values!r} is {kind_of(values)}; it must be a list of whole numbers"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} has the entry {value!r}; entries must be whole numbers")
        if value < 0:
            raise ValueError(
                f"{name} has the entry {value}; numbers start at 0 and do not count from the end"
            )


def require_factor(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number other than zero."""
    require_number(name, value)
    if value == 0:
        raise ValueError(
            f"{name}=0 multiplies the adapter by zero, so it cannot learn; pass another number, such as 16.0"
        )


def require_dropout(name: str, value: Any) -> None:
    """Raise unless ``value`` is a probability below one."""
    require_number(name, value)
    if value == 1:
        raise ValueError(
            f"{name}={value} drops every input of the adapter, so it cannot learn; pass a probability below 1"
        )
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is not a probability; pass a number from 0 to below 1")


def _check_pattern(field: str, patterns: Any) -> None:
    if not patterns:
        return
    if not isinstance(patterns, dict):
        raise TypeError(
            f"{field}={patterns!r} is {kind_of(patterns)}; it must be a dict from module names to numbers"
        )
    for entry, value in patterns.items():
        if not isinstance(entry, str):
            raise TypeError(f"{field} has the key {entry!r}; keys must be module names")
        _require_regex(field, entry)
        if field == "rank_pattern":
            require_integer(f"{field}[{entry!r}]", value, 1)
        else:
            require_factor(f"{field}[{entry!r}]", value)


def _check_names(field: str, value: Any, pattern: bool) -> None:
    if value is None:
        return
    if isinstance(value, str):
        if not pattern:
            raise TypeError(
                f"{field}={value!r} is a string, and PEFT would read each letter as a name; pass a list: "
                f"{field}=[{value!r}]"
            )
        _require_regex(field, value)
        return
    if not isinstance(value, Collection) or isinstance(value, dict):
        kinds = "a list of names or a regular expression" if pattern else "a list of names"
        raise TypeError(f"{field}={value!r} is {kind_of(value)}; it must be {kinds}")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise TypeError(f"{field} has the entry {entry!r}; entries must be names of modules")


def _require_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field}: {pattern!r} is not a regular expression ({error}); escape special characters with a backslash"
        ) from None


def _check_words(config: Any, values: dict[str, Any]) -> None:
    from peft import TaskType

    known = [task.value for task in TaskType]
    task = values.get("task_type")
    if task is not None and task not in known:
        raise ValueError(
            f"task_type={task!r} is unknown; leave it out, or pass one of {', '.join(known)}"
        )
    if config.peft_type == "LORA":
        _check_lora_words(config, values)


def _check_lora_words(config: Any, values: dict[str, Any]) -> None:
    bias, init = values["bias"], values["init_lora_weights"]
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias={bias!r} is unknown; pass 'none', 'all' or 'lora_only'")
    words = set(_literals(typing.get_type_hints(type(config))["init_lora_weights"]))
    number = isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init)
    if not isinstance(init, bool) and init not in words and not number:
        names = sorted(word for word in words if isinstance(word, str) and "[" not in word)
        raise ValueError(
            f"init_lora_weights={init!r} is unknown; pass True or one of {', '.join(names)}"
        )


def _literals(hint: Any) -> list[Any]:
    """Return the values of each ``Literal`` in a type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(inner)
    return [value for part in inner for value in _literals(part)]


def check_tokens(model: nn.Module, config: Any) -> None:
    """Raise unless the entries of ``trainable_token_indices`` and ``init_token_ids`` are rows of their embedding.

    Raises:
        TypeError: An index is not a whole number.
        ContractError: The embedding has no such row.
    """
    start = getattr(config, "init_token_ids", None)
    if start and (embeddings := getattr(model, "get_input_embeddings", lambda: None)()) is not None:
        _check_rows("init_token_ids", start, embeddings)
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return
    from peftkit.find.modules import base_modules

    if not isinstance(wanted, dict):
        found = getattr(model, "get_input_embeddings", lambda: None)()
        if found is None:
            raise ContractError(
                f"trainable_token_indices={wanted!r}: {type(model).__name__} has no input embeddings; pass a dict from the "
                "name of an embedding to indices"
            )
        _check_rows("trainable_token_indices", wanted, found)
        return
    modules = dict(base_modules(model))
    for entry, rows in wanted.items():
        names = [name for name in modules if name.endswith(entry)]
        if not names:
            embeddings = [name for name, m in modules.items() if isinstance(m, nn.Embedding)]
            raise ContractError(
                f"trainable_token_indices: {entry!r} matches nothing; the embeddings of this model are {', '.join(embeddings)}"
            )
        for name in names:
            _check_rows(f"trainable_token_indices[{entry!r}]", rows, modules[name])


def _check_rows(field: str, rows: Any, module: nn.Module) -> None:
    if isinstance(rows, (str, dict)) or not isinstance(rows, Collection):
        raise TypeError(f"{field}={rows!r} is {kind_of(rows)}; it must be a list of token ids")
    weight = getattr(module, "weight", None)
    size = weight.shape[0] if weight is not None else None
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, numbers.Integral):
            raise TypeError(f"{field} has the entry {row!r}; entries must be whole numbers")
        if size is not None and int(row) not in range(size):
            raise ContractError(
                f"{field} has the entry {row}, but {type(module).__name__} has {size} rows (0 to {size - 1}); for new tokens, "
                "call model.resize_token_embeddings(len(tokenizer)) first"
            )
