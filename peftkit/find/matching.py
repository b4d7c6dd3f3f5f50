"""Does every entry of a config match something? PEFT accepts an entry that matches nothing if another one matched."""

from __future__ import annotations

import copy
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.modules import base_modules, storage_of, suffixes
from peftkit.find.targets import peft_rewrite

Matches = dict[tuple[str, str], list[str]]
"""Names by ``(field, entry)``."""

# PEFT's word for a config that adapts no module; a mix without LoRA has it
_NONE = "dummy-target-modules"

# PEFT adds these to modules_to_save by task type, whichever of them the model has.
_HEADS_ADDED_BY_TASK = {"classifier", "score", "qa_outputs"}


def check_targets(model: nn.Module, config: Any) -> None:
    """Raise unless every entry of ``config`` matches something in ``model``.

    Covers ``target_modules``, ``target_parameters``, ``exclude_modules``, ``modules_to_save``, ``feedforward_modules``,
    ``layers_to_transform`` and the keys of ``rank_pattern`` and ``alpha_pattern``.

    Args:
        model: The model the config is for, with or without adapters.
        config: Any ``peft.PeftConfig``.

    Raises:
        ContractError: An entry matches nothing, PEFT would take a module's name for the experts' and leave the module
            itself without an adapter, one of several modules that share a weight is meant, or a rank does not fit a
            grouped convolution.
    """
    _check_nothing_shadowed(model, config)
    matches = match_targets(model, config)
    _check_ties(model, config, matches)
    _check_convolutions(model, config, matches)
    unmatched = [where for where, names in matches.items() if not names]
    if not unmatched:
        return
    modules = dict(base_modules(model))
    problems = [
        f"{field}: {entry!r} matches nothing" + _way_out(field, entry, modules, matches)
        for field, entry in unmatched
    ]
    raise ContractError(
        f"{len(unmatched)} entries of this {type(config).__name__} would do nothing in {type(modules['']).__name__}:\n"
        + listing(problems, shown=8)
    )


def _check_nothing_shadowed(model: nn.Module, config: Any) -> None:
    modules = dict(base_modules(model))
    rewritten = _rewritten(modules[""], config, defaultdict(list))
    if not rewritten:
        return
    matched = _targeted(config, modules, _by_suffix(modules))
    lost = [name for entry in rewritten for name in matched[entry]]
    if lost:
        raise ContractError(
            f"target_modules: PEFT reads {', '.join(rewritten)} as the experts of this architecture, so these modules of the "
            f"same name would get no adapter:\n{listing(lost)}\n"
            "Leave target_modules open for peftkit's all-linear, or pass the weights you mean in target_parameters, such as "
            f"{lost[0] + '.weight'!r}."
        )


def _check_ties(model: nn.Module, config: Any, matches: Matches) -> None:
    """Modules that share a weight, by its storage: an adapter on one of them leaves open what becomes of the others."""
    if getattr(config, "ensure_weight_tying", False):
        return
    modules = dict(base_modules(model))
    sharing: dict[Any, list[str]] = defaultdict(list)
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing[storage_of(weight)].append(name)
    adapted, replaced = _touched(matches)
    for names in sharing.values():
        # a merged adapter, or a trained copy, would change or untie what the others see
        touched = [name for name in names if name in adapted or _inside(name, replaced)]
        if len(names) > 1 and touched:
            others = [name for name in names if name not in touched] or names
            raise ContractError(
                f"{', '.join(touched)} shares its weight with {', '.join(others)}, and this {type(config).__name__} does not "
                "say whether they stay one: pass ensure_weight_tying=True to adapt or train them as one, untie them first "
                f"({names[-1]}.weight = torch.nn.Parameter({names[-1]}.weight.detach().clone()) and "
                "config.tie_word_embeddings = False), or leave them out"
            )


def _touched(matches: Matches) -> tuple[set[str], set[str]]:
    """Modules that get an adapter on their weight, and modules that are trained as a copy."""
    adapted, replaced = set(), set()
    for (field, _), names in matches.items():
        if field == "target_modules":
            adapted |= set(names)
        elif field == "target_parameters":
            adapted |= {name.rpartition(".")[0] for name in names}
        elif field == "modules_to_save":
            replaced |= set(names)
    return adapted, replaced


def _inside(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _check_convolutions(model: nn.Module, config: Any, matches: Matches) -> None:
    """PEFT divides the rank among the groups of a convolution."""
    if getattr(config, "r", None) is None:
        return
    modules = dict(base_modules(model))
    for (field, _), names in matches.items():
        for name in names if field == "target_modules" else ():
            module = modules.get(name)  # PEFT reads some names as those of parameters
            if not isinstance(module, nn.modules.conv._ConvNd):
                continue
            groups, rank = module.groups, _rank(config, name)
            if rank % groups:
                raise ContractError(
                    f"{name} is a {type(module).__name__} of {groups} groups, and its rank is {rank}: the rank must be a "
                    f"multiple of the groups. Pass r={groups * -(-rank // groups)}, or "
                    f"rank_pattern={{{name!r}: {groups}}}, or leave it out by exclude_modules. (LoRA on a grouped convolution "
                    "cannot be merged.)"
                )


def _rank(config: Any, name: str) -> int:
    """The rank PEFT gives to a module."""
    patterns = getattr(config, "rank_pattern", None) or {}
    found = (rank for entry, rank in patterns.items() if re.match(rf"(.*\.)?({entry})$", name))
    return next(found, config.r)


def _way_out(field: str, entry: str, modules: dict[str, nn.Module], matches) -> str:
    if field == "layers_to_transform":
        return " among the targeted layers; give layer numbers that the model has"
    if field == "exclude_modules" and isinstance(entry, str):
        return "; remove it or correct it" + _close_matches(entry, modules)
    if field in ("rank_pattern", "alpha_pattern"):
        adapted = [n for (f, _), names in matches.items() if f.startswith("target_") for n in names]
        return " that is adapted" + _close_matches(entry, adapted)
    if field == "target_parameters":
        return _close_matches(
            entry, [f"{n}.{own}" for n, m in modules.items() for own in m._parameters]
        )
    return _close_matches(entry, modules)


def _close_matches(entry: str, names: Iterable[str]) -> str:
    """Suggest what was meant, in as many dotted parts as the entry has."""
    names = [name for name in names if name]
    depth = entry.count(".")
    candidates = sorted({suffixes(name)[min(depth, name.count("."))] for name in names})
    close = difflib.get_close_matches(entry, candidates, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return f"; names look like {names[len(names) // 2]!r}" if names else ""


def match_targets(model: nn.Module, config: Any) -> Matches:
    """Find what each entry of a config matches, by PEFT's own rules.

    Args:
        model: The model the config is for, with or without adapters.
        config: Any ``peft.PeftConfig``; fields it lacks are passed over.

    Returns:
        Names of the matched modules (of parameters, for ``target_parameters``) by ``(field, entry)``. An empty list is an
        entry that does nothing.
    """
    modules = dict(base_modules(model))
    by_suffix = _by_suffix(modules)
    parameters = _by_suffix(f"{name}.{own}" for name, m in modules.items() for own in m._parameters)
    matches: Matches = {}
    for entry, names in _targeted(config, modules, by_suffix).items():
        matches["target_modules", entry] = names
    for entry, names in _rewritten(modules[""], config, parameters).items():
        matches["target_modules", entry] = names
    for entry in _entries(getattr(config, "target_parameters", None)):
        matches["target_parameters", entry] = parameters[entry]
    adapted = [name for names in matches.values() for name in names]

    for entry in _entries(getattr(config, "exclude_modules", None)):
        pattern = isinstance(config.exclude_modules, str)
        names = [n for n in modules if re.fullmatch(entry, n)] if pattern else by_suffix[entry]
        matches["exclude_modules", entry] = names
    saved = {
        e: [n for n in modules if n.endswith(e)]
        for e in _entries(getattr(config, "modules_to_save", None))
    }
    one_head_found = any(saved[entry] for entry in saved.keys() & _HEADS_ADDED_BY_TASK)
    for entry, names in saved.items():
        if names or not (one_head_found and entry in _HEADS_ADDED_BY_TASK):
            matches["modules_to_save", entry] = names
    for entry in _entries(getattr(config, "feedforward_modules", None)):
        pattern = isinstance(config.feedforward_modules, str)
        hit = [n for n in adapted if (re.fullmatch(entry, n) if pattern else entry in suffixes(n))]
        matches["feedforward_modules", entry] = hit

    layers = getattr(config, "layers_to_transform", None)
    for layer in [layers] if isinstance(layers, int) else layers or []:
        one = copy.copy(config)
        one.layers_to_transform = [layer]
        found = _targeted(one, modules, by_suffix).values()
        matches["layers_to_transform", str(layer)] = [name for names in found for name in names]
    for field in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(config, field, None) or {}:
            matches[field, entry] = [n for n in adapted if re.match(rf"(.*\.)?({entry})$", n)]
    return matches


def _by_suffix(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for suffix in suffixes(name):
            found[suffix].append(name)
    return found


def _entries(value: str | Iterable[str] | None) -> list[str]:
    if isinstance(value, str):
        return [] if value.lower() in ("all-linear", _NONE) else [value]
    return [] if value is None else sorted(value)


def _targeted(config: Any, modules: dict[str, nn.Module], by_suffix) -> dict[str, list[str]]:
    """Matches of each entry of ``target_modules`` once exclusions and layer numbers have been applied."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(config, "target_modules", None)
    found = {}
    for entry in _entries(targets):
        one = copy.copy(config)
        one.target_modules = entry if isinstance(targets, str) else {entry}
        candidates = modules if isinstance(targets, str) else by_suffix[entry]
        found[entry] = [name for name in candidates if check_target_module_exists(one, name)]
    return found


def _rewritten(model: nn.Module, config: Any, parameters) -> dict[str, list[str]]:
    """Parameters matched by the entries that PEFT reads as names of experts (mixtures of experts of transformers 4)."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) or not targets or config.peft_type != "LORA":
        return {}
    kept, added = peft_rewrite(model, targets)
    names = [name for entry in sorted(added) for name in parameters[entry]]
    return dict.fromkeys(sorted(set(targets) - kept), names)
