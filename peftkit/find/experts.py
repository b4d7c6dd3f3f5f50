"""Mixtures of experts: their routers, their stacked weights, and the names that PEFT takes for theirs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from torch import nn

from peftkit.find.modules import is_linear_like

ROUTER = "router or gate of a mixture of experts"
STACKED = "experts are stored as {ndim}-D parameters, which take LoRA without dropout, DoRA or bias through target_parameters"
PACKED = (
    "experts are stored packed ({dtype}); load the model unquantised and pass target_parameters"
)


def experts_and_routers(modules: dict[str, nn.Module]) -> tuple[dict[str, str], list[str]]:
    """Reasons for the parts of mixture-of-experts blocks that "all-linear" does not adapt, and the stacks that it does.

    A block is whatever holds a container of experts: a child called ``experts``, or one whose class says so.
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
                odd, whole = _stacked_weights(inner, modules[inner])
                left_out |= odd
                stacks += whole
        count = _count_experts(module)
        for other in _below(names, places, parent):
            beside = other.removeprefix(f"{parent}.") if parent else other
            if other not in inside and _is_router(beside, modules[other], count):
                left_out[other] = ROUTER
    return left_out, list(dict.fromkeys(stacks))


def _below(names: list[str], places: dict[str, int], parent: str) -> Iterator[str]:
    """The names inside ``parent``; ``names`` lists every module before its children, ``places`` gives the index of each."""
    prefix = f"{parent}." if parent else ""
    inside = itertools.islice(names, places[parent] + 1, None)
    return itertools.takewhile(lambda name: name.startswith(prefix), inside)


def _stacked_weights(name: str, module: nn.Module) -> tuple[dict[str, str], list[str]]:
    """The expert weights of one module: those that cannot be adapted with the reason, and those that can."""
    reasons, stacks = {}, []
    for own, weight in module._parameters.items():
        if weight is None or weight.ndim < 2 or own.endswith("bias"):
            continue
        if not weight.is_floating_point():
            dtype = str(weight.dtype).removeprefix("torch.")
            reasons[f"{name}.{own}"] = PACKED.format(dtype=dtype)
        elif weight.ndim == 3:
            stacks.append(f"{name}.{own}")
        else:
            # PEFT would put one low-rank pair over all experts
            reasons[f"{name}.{own}"] = STACKED.format(ndim=weight.ndim)
    return reasons, stacks


def _count_experts(container: nn.Module) -> int | None:
    if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return len(container)
    stacked = [p.shape[0] for p in container.parameters() if p.ndim == 3]
    return stacked[0] if stacked else getattr(container, "num_experts", None)


def _is_router(beside: str, module: nn.Module, experts: int | None) -> bool:
    """Whether a module next to the experts chooses among them; ``beside`` is its name within the block."""
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
    """Module names that PEFT turns into expert parameters for this architecture, wherever they stand.

    Checkpoints of transformers 4 had one linear a expert; PEFT therefore reads ``gate_proj`` in ``target_modules`` as the
    experts' ``gate_up_proj``, even where ``shared_expert.gate_proj`` was meant.
    """
    return {leaf for leaf in leaves if peft_rewrite(model, [leaf])[0] != {leaf}}


def peft_rewrite(model: nn.Module, entries: Iterable[str]) -> tuple[set[str], set[str]]:
    """The ``target_modules`` and added ``target_parameters`` that PEFT makes of ``entries`` for this architecture."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    entries = set(entries)
    config = LoraConfig(target_modules=set(entries))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:
        # Only one of two projections that PEFT fuses was named: rewritten, but not alone.
        return set(), set()
    return set(config.target_modules or ()), set(config.target_parameters or ())
