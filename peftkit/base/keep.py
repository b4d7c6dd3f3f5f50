"""Decide which linear layers are quantised, and which stay in 16 or 32 bits and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from peftkit.errors import ContractError, listing, short
from peftkit.find.direct import weights_used_directly
from peftkit.find.experts import ROUTER, experts_and_routers
from peftkit.find.heads import find_heads, output_embeddings, poolers
from peftkit.find.modules import ancestors, base_modules, suffixes
from peftkit.find.suggestions import close_matches

BLOCKSIZE = 64
"""Values that share one maximum in 4-bit storage."""

EXPERTS = "experts stacked in one parameter: named in keep, or loaded by transformers, which quantises linear layers only"
EXPERTS_8_BIT = "experts stacked in one parameter, which bitsandbytes stores in 4 bits only"
EXPERT_ROWS = "experts stacked in one parameter, whose rows are no whole blocks of 64"
STACK = "experts stacked in one parameter"
HEAD = "output head"
TASK_HEAD = "task head, which is trained in full"
TIED = "its weight is tied to another module"
BY_TRANSFORMERS = "transformers keeps it for this architecture"
BY_KEEP = "named in keep"
DIRECT = "the model uses its weight without calling the layer, so it must stay a matrix of numbers"
SUBCLASS = "a subclass of nn.Linear, which bitsandbytes' layers cannot replace"


class Choice(NamedTuple):
    """Which layers of a model are quantised.

    Attributes:
        layers: Their names, in the model's order.
        stacks: The names of the parameters with the weights of several experts that 4 bits can store and ``keep`` does not name.
        skipped: The value of ``llm_int8_skip_modules``; ``None`` if transformers chooses the same layers by itself.
    """

    layers: list[str]
    stacks: list[str]
    skipped: list[str] | None


def choose(model: nn.Module, keep: Sequence[str]) -> Choice:
    """Choose the layers to quantise.

    Args:
        model: As for ``kept_modules``.
        keep: As for ``kept_modules``.

    Raises:
        ContractError: An entry of ``keep`` matches nothing, or no layer is left.
    """
    own = skipped_by_transformers(model)
    kept = kept_modules(model, keep, own)
    layers = [name for name, module in model.named_modules() if may_be_quantised(module)]
    chosen = [name for name in layers if name not in kept]
    beyond = [name for name in layers if name in kept and _converted(name, own)]
    skipped = sorted({*own, *beyond}) if beyond else None
    # An entry of the list also stands for names that end with it; a checkpoint that is saved and loaded must choose the same.
    chosen = [name for name in chosen if _converted(name, skipped or own)]
    if not chosen:
        raise ContractError(
            f"{type(model).__name__} has no linear layer to quantise ({len(kept)} stay as they are); use base='bf16'"
        )
    return Choice(chosen, _chosen_stacks(model, keep), skipped)


def _chosen_stacks(model: nn.Module, keep: Sequence[str]) -> list[str]:
    modules = dict(base_modules(model))
    kept = _named(modules, keep)
    return [
        name
        for name in stacked_parameters(model)
        if name not in kept
        and name.rpartition(".")[0] not in kept
        and not model.get_parameter(name).shape[-1] % BLOCKSIZE
    ]


def layers_of_poolers(model: nn.Module) -> list[str]:
    """The linear layers of poolers. If a checkpoint has no pooler, they will be new and trained in full, so they are not quantised.

    Args:
        model: The model before its weights are loaded.
    """
    modules = dict(base_modules(model))
    found = set(poolers(modules))
    return [
        name
        for name, module in modules.items()
        if may_be_quantised(module) and found & {name, *ancestors(name)}
    ]


def skipped_by_transformers(model: Any) -> list[str]:
    """The entries of ``llm_int8_skip_modules`` that transformers uses if there are none; empty for models of other libraries."""
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

    if not isinstance(model, PreTrainedModel):
        return []
    return HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)


def kept_modules(
    model: Any, keep: Sequence[str] = (), skipped: Iterable[str] = ()
) -> dict[str, str]:
    """The linear layers of a model that stay as they are, with the reason, in the model's order.

    Args:
        model: The model before any of its layers is quantised; it may be on the device ``meta``.
        keep: What the user wants to keep: names of modules, ends of names, or patterns with ``*``. A module that contains others
            stands for all of them.
        skipped: Entries of ``llm_int8_skip_modules`` that transformers itself would use.

    Raises:
        ContractError: An entry of ``keep`` matches nothing.
    """
    modules = dict(base_modules(model))
    reasons = _named(modules, keep)
    routers = experts_and_routers(modules)[0]
    outputs = output_embeddings(modules)
    heads = find_heads(model)
    heads = {*heads.names, *heads.out_of_reach}
    tied = _tied(model)
    kept = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        inside = {name, *ancestors(name)}
        if name in reasons:
            kept[name] = reasons[name]
        elif name in outputs:
            kept[name] = HEAD
        elif routers.get(name) == ROUTER:
            kept[name] = ROUTER
        elif inside & heads:
            kept[name] = TASK_HEAD
        elif f"{name}.weight" in tied:
            kept[name] = TIED
        elif name.rpartition(".")[2] in weights_used_directly(modules[name.rpartition(".")[0]]):
            kept[name] = DIRECT
        elif not may_be_quantised(module):
            kept[name] = SUBCLASS
        elif not _converted(name, skipped):
            kept[name] = BY_TRANSFORMERS
    return kept


def inner_linears(model: Any) -> tuple[list[str], dict[str, str]]:
    """The linear layers inside a model: not its heads, routers, or layers whose weight is tied to another module.

    Args:
        model: A model in 16 or 32 bits.

    Returns:
        Their names, and the names of the other linear layers and of stacked experts with the reason.
    """
    kept = kept_modules(model)
    stacks = dict.fromkeys(stacked_parameters(model), STACK)
    names = [
        name
        for name, module in base_modules(model)
        if may_be_quantised(module) and name not in kept
    ]
    return names, kept | stacks


def may_be_quantised(module: nn.Module) -> bool:
    """Whether transformers replaces a module of this class by one of bitsandbytes."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def require_keep(keep: Any) -> tuple[str, ...]:
    """The entries of ``keep``.

    Raises:
        ContractError: It is not a list of non-empty strings.
    """
    if isinstance(keep, str):
        raise ContractError(f"keep={keep!r} is one string; pass a list: keep=[{keep!r}]")
    entries = tuple(keep) if isinstance(keep, Iterable) else (keep,)
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ContractError(
                f"keep has {short(entry)}; its entries are names of modules or patterns, such as 'down_proj' or 'model.layers.0.*'"
            )
    return entries


def stacked_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that hold the weights of several experts."""
    return experts_and_routers(dict(base_modules(model)))[1]


def _named(modules: dict[str, nn.Module], keep: Sequence[str]) -> dict[str, str]:
    """The modules and stacks of experts that ``keep`` names, directly or by a module around them."""
    stacks = experts_and_routers(modules)[1]
    names = [*modules, *stacks]
    found: dict[str, str] = {}
    unmatched = []
    for entry in keep:
        hit = {name for name in names if name and _matches(entry, name)}
        inside = [name for name in names if hit & {name, *ancestors(name)}]
        if not hit:
            unmatched.append(f"{entry!r} matches nothing{close_matches(entry, modules)}")
        elif not any(name in stacks or may_be_quantised(modules[name]) for name in inside):
            unmatched.append(
                f"{entry!r} matches {min(hit, key=len)!r}, in which no layer would be quantised; remove the entry"
            )
        found |= dict.fromkeys(inside, BY_KEEP)
    if unmatched:
        raise ContractError("entries of keep have no effect:\n" + listing(unmatched, shown=8))
    return found


def _matches(entry: str, name: str) -> bool:
    return entry in suffixes(name) or ("*" in entry and fnmatch.fnmatchcase(name, entry))


def _tied(model: Any) -> set[str]:
    """The names of tied parameters, of both sides."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if ties is not None:
        return {*ties, *ties.values()}
    first: dict[int, str] = {}
    tied = set()
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                other = first.setdefault(id(parameter), f"{name}.{own}")
                tied |= {f"{name}.{own}", other} if other != f"{name}.{own}" else set()
    return tied


def _converted(name: str, skipped: Iterable[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return should_convert_module(name, list(skipped))
