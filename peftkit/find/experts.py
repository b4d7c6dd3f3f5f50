"""Mixtures of experts: find routers, stacked weights, and the module names that PEFT reads as names of experts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from torch import nn

from peftkit.find.modules import is_linear_like, is_quantised
from peftkit.find.stacks import packed_parameter, packed_stacks

ROUTER = "router or gate of a mixture of experts"
STACKED = (
    "experts are stored as {ndim}-D parameters; only LoRA without dropout, without DoRA and without bias can adapt them, "
    "through target_parameters"
)
PACKED = (
    "experts are stored packed ({dtype}); load the model unquantised and pass target_parameters"
)


def experts_and_routers(modules: dict[str, nn.Module]) -> tuple[dict[str, str], list[str]]:
    """Find the parts of mixture-of-experts blocks that "all-linear" does not adapt, and the stacked weights that it adapts.

    A block is a module with a container of experts: a child named ``experts``, or a child whose class name ends in ``Experts``.

    Returns:
        The reason for each part that is not adapted, by name; and the names of the stacked weights.
    """
    left_out: dict[str, str] = {}
    stacks: list[str] = []
    names = list(modules)
    places = {name: place for place, name in enumerate(names)}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf != "experts" and not type(module).__name__.endswith("Experts"):
            continue
        inside = {name, *_below(names, places, name)}
        for inner in inside:
            if not is_linear_like(modules[inner]):
                reasons, usable = _stacked_weights(inner, modules[inner])
                left_out |= reasons
                stacks += usable
        count = _count_experts(module)
        for other in _below(names, places, parent):
            beside = other.removeprefix(f"{parent}.") if parent else other
            if other not in inside and _is_router(beside, modules[other], count):
                left_out[other] = ROUTER
    return left_out, list(dict.fromkeys(stacks))


def _below(names: list[str], places: dict[str, int], parent: str) -> Iterator[str]:
    """Yield the names inside ``parent``. ``names`` has parents before children; ``places`` is the index of each name."""
    prefix = f"{parent}." if parent else ""
    inside = itertools.islice(names, places[parent] + 1, None)
    return itertools.takewhile(lambda name: name.startswith(prefix), inside)


def _stacked_weights(name: str, module: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Return the expert weights of one module: the reasons for those that cannot be adapted, and the names of the others."""
    reasons, stacks = {}, [f"{name}.{own}" for own in packed_stacks(module)]
    if packed_parameter(module) is not None:
        return {}, []
    for own, weight in module._parameters.items():
        if weight is None or weight.ndim < 2 or own.endswith("bias"):
            continue
        if is_quantised(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            reasons[f"{name}.{own}"] = PACKED.format(dtype=dtype)
        elif weight.ndim == 3:
            stacks.append(f"{name}.{own}")
        else:
            # PEFT would use one low-rank pair for all experts together
            reasons[f"{name}.{own}"] = STACKED.format(ndim=weight.ndim)
    return reasons, stacks


def _count_experts(container: nn.Module) -> int | None:
    if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return len(container)
    stacked = [p.shape[0] for p in container.parameters() if p.ndim == 3]
    return stacked[0] if stacked else getattr(container, "num_experts", None)


def _is_router(beside: str, module: nn.Module, experts: int | None) -> bool:
    """Whether a module of the block is the router. ``beside`` is its name within the block."""
    weight = module._parameters.get("weight")
    if not is_linear_like(module) and (weight is None or weight.ndim != 2):
        return False
    if isinstance(module, nn.Embedding):
        return False
    first, *rest = beside.split(".")
    if "router" in first or re.fullmatch(r"(shared_experts?_)?(gate|gating)", first):
        return True
    rows = getattr(module, "out_features", weight.shape[0] if weight is not None else None)
    return not rest and experts is not None and rows == experts


def names_peft_rewrites(model: nn.Module, leaves: set[str]) -> set[str]:
    """Return the module names that PEFT rewrites to expert parameters for this architecture.

    Checkpoints of transformers 4 had one linear layer per expert. PEFT therefore reads ``gate_proj`` in ``target_modules`` as
    the experts' ``gate_up_proj``, even if ``shared_expert.gate_proj`` was meant.
    """
    return {leaf for leaf in leaves if peft_rewrite(model, [leaf])[0] != {leaf}}


def peft_rewrite(model: nn.Module, entries: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the ``target_modules`` and ``target_parameters`` to which PEFT converts ``entries`` for this architecture."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    entries = set(entries)
    config = LoraConfig(target_modules=set(entries))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:
        # PEFT fuses two projections and only one of them was named. It would be rewritten together with the other one.
        return set(), set()
    return set(config.target_modules or ()), set(config.target_parameters or ())
