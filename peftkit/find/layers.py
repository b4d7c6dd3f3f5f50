"""Find layer numbers in module names, by PEFT's rules for ``layers_to_transform`` and ``layers_pattern``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peftkit.errors import ContractError

_NUMBERED = re.compile(r".*?\.([^.]*)\.(\d+)\.")


def wanted_layers(config: Any) -> list[int]:
    """Return the entries of ``layers_to_transform``. An empty list means all layers."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def layer_number(name: str, config: Any) -> int | None:
    """Return the layer number that PEFT finds in a module's name, or None."""
    patterns = getattr(config, "layers_pattern", None)
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", name)
        if found:
            return int(found["number"])
    return None


def check_layers(config: Any, names: Iterable[str]) -> None:
    """Raise unless each layer of ``layers_to_transform`` has a target.

    Args:
        config: A ``peft.PeftConfig``.
        names: Names of the targets in all layers.

    Raises:
        ContractError: ``layers_pattern`` matches no target, or a layer has no target.
    """
    wanted = wanted_layers(config)
    names = list(names)
    if not wanted or not names:
        return
    numbers = {number for name in names if (number := layer_number(name, config)) is not None}
    pattern = getattr(config, "layers_pattern", None)
    if not numbers and pattern:
        lists = sorted({found[1] for name in names if (found := _NUMBERED.match(name))})
        way_out = (
            f"the targets are in {' and '.join(map(repr, lists))}" if lists else "leave it out"
        )
        raise ContractError(
            f"layers_pattern={pattern!r} is not the name of a numbered list that has targets; {way_out}"
        )
    missing = [repr(str(layer)) for layer in wanted if layer not in numbers]
    if missing:
        where = f"in layers {_ranges(numbers)}" if numbers else "in no numbered layer"
        raise ContractError(
            f"layers_to_transform: {', '.join(missing)} matches nothing; the targets are {where}"
        )


def _ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` gives ``"0 to 2 and 5"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " and ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
