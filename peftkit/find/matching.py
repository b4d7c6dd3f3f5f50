"""Check that every entry of a config matches something. PEFT accepts an entry without a match if another entry has one."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.conflicts import check_convolutions, check_ranks, check_shadowed, check_ties
from peftkit.find.experts import peft_rewrite
from peftkit.find.layers import check_layers, layer_number, wanted_layers
from peftkit.find.modules import base_modules, suffixes
from peftkit.find.stacks import packed_stacks
from peftkit.find.suggestions import close_matches
from peftkit.find.ties import other_names

Matches = dict[tuple[str, str], list[str]]
"""Names by ``(field, entry)``."""

# PEFT's value of target_modules for a config that adapts no module, such as a mix without LoRA
_NONE = "dummy-target-modules"

# PEFT adds these to modules_to_save for some task types, even if the model does not have all of them.
_HEADS_ADDED_BY_TASK = {"classifier", "score", "qa_outputs"}


def check_targets(model: nn.Module, config: Any) -> None:
    """Raise unless every entry of ``config`` matches something in ``model``.

    Covers ``target_modules``, ``target_parameters``, ``exclude_modules``, ``modules_to_save``, ``feedforward_modules``,
    ``layers_to_transform``, ``layers_pattern`` and the keys of ``rank_pattern`` and ``alpha_pattern``.

    Args:
        model: The model that the config is for, with or without adapters.
        config: Any ``peft.PeftConfig``.

    Raises:
        ContractError: An entry matches nothing; PEFT would read a module's name as that of experts, so that the module gets no
            adapter; one of several modules that share a weight would be adapted; a rank is larger than every module with this
            rank; or a rank does not fit a grouped convolution.
    """
    modules = dict(base_modules(model))
    names = _Names(modules)
    reachable = _targeted(_everywhere(config), names)
    if wanted_layers(config):
        check_layers(config, [name for found in reachable.values() for name in found])
    rewritten = _rewritten(modules[""], config, names)
    check_shadowed(rewritten, _targeted(config, names) if rewritten else {})
    matches = _match(config, names, rewritten)
    check_ties(modules, config, matches)
    check_convolutions(modules, config, matches)
    check_ranks(modules, config, matches)
    unmatched = [where for where, found in matches.items() if not found]
    if not unmatched:
        return
    problems = [
        f"{field}: {entry!r} " + _reason(field, entry, config, names, matches, reachable)
        for field, entry in unmatched
    ]
    raise ContractError(
        f"{_count(len(unmatched))} of this {type(config).__name__} would have no effect in {type(modules['']).__name__}:\n"
        + listing(problems, shown=8)
    )


def _count(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"


def match_targets(model: nn.Module, config: Any) -> Matches:
    """Find what each entry of a config matches, by PEFT's own rules.

    Args:
        model: The model that the config is for, with or without adapters.
        config: Any ``peft.PeftConfig``; fields that it does not have are skipped.

    Returns:
        Names of the matched modules (or parameters, for ``target_parameters``) by ``(field, entry)``. An entry with an empty
        list has no effect.
    """
    names = _Names(dict(base_modules(model)))
    return _match(config, names, _rewritten(names.modules[""], config, names))


class _Names:
    """Finds names of modules and parameters by the ends of the names."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self._by_leaf = _grouped(modules)
        self._parameters_by_leaf: dict[str, list[str]] | None = None

    def ending(self, entry: str) -> list[str]:
        """Return the modules that an entry of a list matches: their names equal the entry or end with a dot and the entry."""
        return _ending(entry, self._by_leaf)

    def parameters_ending(self, entry: str) -> list[str]:
        """Return the parameters that an entry of ``target_parameters`` matches."""
        if self._parameters_by_leaf is None:
            self._parameters_by_leaf = _grouped(self.parameters())
        return _ending(entry, self._parameters_by_leaf)

    def parameters(self) -> list[str]:
        """Return the full names of all parameters."""
        return [
            f"{name}.{own}"
            for name, m in self.modules.items()
            for own in (*m._parameters, *packed_stacks(m))
        ]


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[name.rpartition(".")[2]].append(name)
    return found


def _ending(entry: str, by_leaf: Mapping[str, list[str]]) -> list[str]:
    candidates = by_leaf.get(entry.rpartition(".")[2], [])
    return [name for name in candidates if name == entry or name.endswith(f".{entry}")]


def _match(config: Any, names: _Names, rewritten: Mapping[str, list[str]]) -> Matches:
    matches: Matches = {}
    for entry, found in _targeted(config, names).items():
        matches["target_modules", entry] = found
    for entry, found in rewritten.items():
        matches["target_modules", entry] = found
    for entry in _entries(getattr(config, "target_parameters", None)):
        matches["target_parameters", entry] = names.parameters_ending(entry)
    adapted = [name for found in matches.values() for name in found]

    for entry in _entries(getattr(config, "exclude_modules", None)):
        pattern = isinstance(config.exclude_modules, str)
        found = (
            [n for n in names.modules if re.fullmatch(entry, n)] if pattern else names.ending(entry)
        )
        matches["exclude_modules", entry] = found
    known = [*names.modules, *other_names(names.modules)]
    saved = {
        e: [n for n in known if n.endswith(e)]
        for e in _entries(getattr(config, "modules_to_save", None))
    }
    one_head_found = any(saved[entry] for entry in saved.keys() & _HEADS_ADDED_BY_TASK)
    for entry, found in saved.items():
        if found or not (one_head_found and entry in _HEADS_ADDED_BY_TASK):
            matches["modules_to_save", entry] = found
    for entry in _entries(getattr(config, "feedforward_modules", None)):
        pattern = isinstance(config.feedforward_modules, str)
        hit = [n for n in adapted if (re.fullmatch(entry, n) if pattern else entry in suffixes(n))]
        matches["feedforward_modules", entry] = hit

    for layer in wanted_layers(config):
        found = [name for name in adapted if layer_number(name, config) == layer]
        matches["layers_to_transform", str(layer)] = found
    for field in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(config, field, None) or {}:
            matches[field, entry] = [n for n in adapted if re.match(rf"(.*\.)?({entry})$", n)]
    return matches


def _entries(value: str | Iterable[str] | None) -> list[str]:
    if isinstance(value, str):
        return [] if value.lower() in ("all-linear", _NONE) else [value]
    return [] if value is None else sorted(value)


def _targeted(config: Any, names: _Names) -> dict[str, list[str]]:
    """Return the matches of each entry of ``target_modules``, after exclusions and layer numbers have been applied."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(config, "target_modules", None)
    found = {}
    for entry in _entries(targets):
        one = copy.copy(config)
        one.target_modules = entry if isinstance(targets, str) else {entry}
        candidates = names.modules if isinstance(targets, str) else names.ending(entry)
        found[entry] = [name for name in candidates if check_target_module_exists(one, name)]
    return found


def _rewritten(model: nn.Module, config: Any, names: _Names) -> dict[str, list[str]]:
    """Return the parameters matched by entries that PEFT reads as names of experts (mixtures of experts of transformers 4)."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) or not targets or config.peft_type != "LORA":
        return {}
    kept, added = peft_rewrite(model, targets)
    found = [name for entry in sorted(added) for name in names.parameters_ending(entry)]
    return dict.fromkeys(sorted(set(targets) - kept), found)


def _everywhere(config: Any, keep: str = "") -> Any:
    """Return the config without the fields that narrow down ``target_modules``, except ``keep``."""
    wide = copy.copy(config)
    for field in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if field != keep and hasattr(wide, field):
            setattr(wide, field, None)
    return wide


def _reason(
    field: str,
    entry: str,
    config: Any,
    names: _Names,
    matches: Matches,
    reachable: Mapping[str, list[str]],
) -> str:
    """Return why an entry has no effect, and a way out."""
    if field == "target_modules" and (found := reachable.get(entry)):
        return _narrowed(entry, config, names, len(found))
    if field == "layers_to_transform":
        return "has no target left; check exclude_modules and modules_to_save"
    if isinstance(getattr(config, field), str):
        way_out = close_matches(entry, names.modules)
        if names.ending(entry):
            way_out = f"; pass a list to match the ends of names: {field}=[{entry!r}]"
        return f"matches nothing as a regular expression for whole names{way_out}"
    if field in ("rank_pattern", "alpha_pattern"):
        adapted = [n for (f, _), found in matches.items() if f.startswith("target_") for n in found]
        return "matches nothing that is adapted" + close_matches(entry, adapted)
    if field == "target_parameters":
        return "matches nothing" + close_matches(entry, names.parameters())
    return "matches nothing" + close_matches(entry, names.modules)


def _narrowed(entry: str, config: Any, names: _Names, count: int) -> str:
    """Return which other field excludes all modules that an entry of ``target_modules`` matches."""
    modules = "the one module" if count == 1 else f"all {count} modules"
    for field in ("exclude_modules", "modules_to_save"):
        if getattr(config, field, None) and not _targeted(_everywhere(config, field), names)[entry]:
            return f"matches nothing, because {field} has {modules} of that name; remove the entry from one of the two fields"
    return f"matches nothing in the layers that layers_to_transform and exclude_modules leave, but {modules} in other layers"
