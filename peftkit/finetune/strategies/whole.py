"""Strategies that train weights of the model itself: all of them, or a part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.suggestions import close_matches
from peftkit.finetune.blocks import Places, is_norm
from peftkit.finetune.schema import key
from peftkit.finetune.strategies.base import FULL_LR, AdapterSetting, Prepared, Strategy, train_all
from peftkit.finetune.zeros import keep_zeros

_KEEP_ZEROS = "Weights of inner linear layers that are zero, as peftkit prune makes them, stay zero"


@dataclass
class FullOptions:
    """Options of ``full``."""

    keep_zeros: bool = key(False, _KEEP_ZEROS)


class Full(Strategy):
    """Train every weight."""

    name = "full"
    summary = "every weight; with keep_zeros a pruned model keeps its zeros"
    Options = FullOptions

    @classmethod
    def apply(cls, model: nn.Module, options: FullOptions, setting: AdapterSetting) -> Prepared:
        train_all(model)
        if options.keep_zeros:
            keep_zeros(model)
        return Prepared(model)


@dataclass
class PartialOptions:
    """The parts that are trained, added together."""

    last_blocks: int = key(0, "Number of blocks, counted from the last", least=0)
    head: bool = key(True, "The task head, if the model has one")
    biases: bool = key(False, "All biases (BitFit, arXiv:2106.10199)")
    norms: bool = key(False, "All normalisation layers")
    pattern: str | None = key(None, "Regular expression for names of parameters")
    keep_zeros: bool = key(False, _KEEP_ZEROS)


class Partial(Strategy):
    """Train the last blocks, the head, biases, norms, or what a pattern matches."""

    name = "partial"
    summary = "the last blocks, the head alone, biases, norms, or what a pattern matches"
    Options = PartialOptions
    lr = 2.5 * FULL_LR

    @classmethod
    def check(cls, options: PartialOptions, recipe: Any) -> None:
        if options.pattern is not None:
            try:
                re.compile(options.pattern)
            except re.error as error:
                raise ContractError(
                    f"strategy.pattern={options.pattern!r} is not a regular expression ({error}); escape special characters with a "
                    "backslash"
                ) from None

    @classmethod
    def apply(cls, model: nn.Module, options: PartialOptions, setting: AdapterSetting) -> Prepared:
        names = _selected(model, options)
        if not names:
            raise ContractError(
                f"strategy partial selects no weight of {type(model).__name__}: it has no task head, and last_blocks=0, biases=false, "
                "norms=false and no pattern; set one of them, such as strategy.last_blocks=2"
            )
        train_only(model, names)
        if options.keep_zeros:
            keep_zeros(model)
        return Prepared(model)


def _selected(model: nn.Module, options: PartialOptions) -> set[str]:
    places = Places(model)
    if options.last_blocks and not places.stacks:
        raise ContractError(
            f"strategy.last_blocks={options.last_blocks}, but {type(model).__name__} has no list of equal blocks; name what to train with "
            f"strategy.pattern, a regular expression. The modules at the top are {', '.join(_tops(model))}"
        )
    if options.last_blocks > places.depth:
        raise ContractError(
            f"strategy.last_blocks={options.last_blocks}, but {type(model).__name__} has {places.depth} blocks; use at most that many"
        )
    norms = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
    }
    names = dict(model.named_parameters())
    found = set()
    for name in names:
        block = places.block(name)
        if (
            (options.head and places.is_head(name))
            or (block is not None and block >= places.depth - options.last_blocks)
            or (options.biases and name.rpartition(".")[2] == "bias")
            or (options.norms and name in norms)
        ):
            found.add(name)
    if options.pattern is not None:
        matched = {name for name in names if re.search(options.pattern, name)}
        if not matched:
            raise ContractError(
                f"strategy.pattern={options.pattern!r} matches no parameter{close_matches(options.pattern, names)}"
            )
        found |= matched
    require_new_heads(model, places, found)
    return found


def _tops(model: nn.Module, shown: int = 12) -> list[str]:
    """The names of the outermost modules with parameters, below those that are alone in theirs."""
    name, module = "", model
    while True:
        inner = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        if len(inner) != 1 or not list(inner[0][1].children()):
            break
        name, module = f"{name}{inner[0][0]}.", inner[0][1]
    names = [f"{name}{n}" for n, _ in inner]
    return [*names[:shown], *(["..."] if len(names) > shown else [])]


def require_new_heads(model: nn.Module, places: Places, trained: set[str]) -> None:
    """Raise ``ContractError`` if a task head with random weights would stay frozen."""
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if places.is_head(name)
        and name not in trained
        and getattr(parameter, "_is_hf_initialized", False) is not True
    ]
    if frozen and any(getattr(p, "_is_hf_initialized", False) is True for p in model.parameters()):
        raise ContractError(
            f"the task head is new, so its weights are random, but the strategy does not train them:\n{listing(frozen)}\n"
            "Set strategy.head=true."
        )


def train_only(model: nn.Module, names: set[str]) -> None:
    """Set ``requires_grad`` of exactly these parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
