"""Check that a config has no conflicts with the model: shared weights, impossible ranks, names that PEFT rewrites."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftkit.errors import ContractError, listing
from peftkit.find.modules import storage_of
from peftkit.find.ties import all_saved, other_names

Modules = Mapping[str, nn.Module]
Matches = Mapping[tuple[str, str], list[str]]


def check_shadowed(rewritten: Mapping[str, list[str]], matched: Mapping[str, list[str]]) -> None:
    """Raise if PEFT reads entries as names of experts, so that modules with the same name get no adapter.

    Args:
        rewritten: Expert parameters by entry that PEFT rewrites.
        matched: Modules by entry of ``target_modules``.

    Raises:
        ContractError: There are such modules.
    """
    lost = [name for entry in rewritten for name in matched[entry]]
    if lost:
        raise ContractError(
            f"target_modules: PEFT reads {', '.join(rewritten)} as the experts of this architecture, so these modules of the "
            f"same name would get no adapter:\n{listing(lost)}\n"
            "Leave target_modules out to use peftkit's all-linear, or pass the weights in target_parameters, such as "
            f"{lost[0] + '.weight'!r}."
        )


def check_ties(modules: Modules, config: Any, matches: Matches) -> None:
    """Raise if a module that shares its weight with others is adapted, and ``ensure_weight_tying`` is not set.

    Raises:
        ContractError: There is such a module.
    """
    if getattr(config, "ensure_weight_tying", False):
        return
    adapted, replaced = _touched(matches)
    _check_other_names(modules, adapted)
    sharing: dict[Any, list[str]] = defaultdict(list)
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing[storage_of(weight)].append(name)
    for names in sharing.values():
        if len(names) == 1:
            continue
        # merging the adapter would change the weight of the other modules, and a trained copy would untie it
        touched = [name for name in names if name in adapted or _inside(name, replaced)]
        if touched and not (adapted.isdisjoint(names) and all_saved(names, modules, replaced)):
            others = [name for name in names if name not in touched] or names
            raise ContractError(
                f"{', '.join(touched)} shares its weight with {', '.join(others)}, and this {type(config).__name__} does not "
                "say whether they stay tied: pass ensure_weight_tying=True to adapt or train them together, untie them first "
                f"({names[-1]}.weight = torch.nn.Parameter({names[-1]}.weight.detach().clone()) and "
                "config.tie_word_embeddings = False), or leave them out"
            )


def _check_other_names(modules: Modules, adapted: set[str]) -> None:
    """Raise if a module with several names is adapted: PEFT would put the adapter under one of them only."""
    for other, first in other_names(modules).items():
        if first in adapted:
            raise ContractError(
                f"{first} and {other} are one module, and PEFT would adapt it under the first name only; leave it out with "
                f"exclude_modules={[first]!r}, or make {other} a module of its own (copy.deepcopy)"
            )


def _touched(matches: Matches) -> tuple[set[str], set[str]]:
    """Return the modules that get an adapter on their weight, and the modules of which a copy is trained."""
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


def check_convolutions(modules: Modules, config: Any, matches: Matches) -> None:
    """Raise if a rank is not a multiple of the number of groups of a convolution, because PEFT divides the rank by it.

    Raises:
        ContractError: There is such a convolution.
    """
    if getattr(config, "r", None) is None:
        return
    for name in _targets(matches):
        module = modules.get(name)  # None if PEFT reads the entry as a name of parameters
        if not isinstance(module, nn.modules.conv._ConvNd):
            continue
        groups, rank = module.groups, _rank(config, name)
        if rank % groups:
            raise ContractError(
                f"{name} is a {type(module).__name__} of {groups} groups, and its rank is {rank}: the rank must be a "
                f"multiple of the number of groups. Pass r={groups * -(-rank // groups)} or "
                f"rank_pattern={{{name!r}: {groups}}}, or list the module in exclude_modules. (LoRA on a grouped convolution "
                "cannot be merged.)"
            )


def check_ranks(modules: Modules, config: Any, matches: Matches) -> None:
    """Raise if a LoRA rank is larger than both sides of every weight that has this rank.

    The product of the two factors has at most the rank of the weight's smaller side, so a larger rank only needs more memory.

    Raises:
        ContractError: There is such a rank.
    """
    if getattr(config, "peft_type", None) not in ("LORA", "PEFTKIT_MIX"):
        return
    sides: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for name in _targets(matches):
        if name in modules and (found := _sides(modules[name])):
            sides[_rank(config, name)].append(found)
    for rank, found in sides.items():
        if rank > max(map(max, found)):
            useful = max(map(min, found))
            where = "r" if rank == config.r else "rank_pattern"
            raise ContractError(
                f"{where}={rank} is larger than both sides of every weight with this rank; the largest useful rank is {useful}, "
                "and 4 to 64 is common"
            )


def _sides(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return None  # check_convolutions checks the rank of a convolution
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    return weight.shape[0], weight[0].numel()


def _targets(matches: Matches) -> list[str]:
    return [
        name for (field, _), names in matches.items() if field == "target_modules" for name in names
    ]


def _rank(config: Any, name: str) -> int:
    """Return the rank that PEFT uses for a module."""
    patterns = getattr(config, "rank_pattern", None) or {}
    found = (rank for entry, rank in patterns.items() if re.match(rf"(.*\.)?({entry})$", name))
    return next(found, config.r)
