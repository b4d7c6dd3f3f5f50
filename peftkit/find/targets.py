"""Which modules "all-linear" means: every linear-like layer of the backbone, stacked experts included, and why what is left out is.

PEFT's own "all-linear" depends on the architecture: on mixtures of experts it adds the router, drops shared experts and
doubles ranks. Ours means the same everywhere, and says what it left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkit.find.heads import heads_among, output_embeddings, outside_backbone
from peftkit.find.modules import (
    ancestors,
    base_modules,
    is_linear_like,
    suffixes,
)
from peftkit.find.modules import is_own_adapter as is_own_adapter
from peftkit.find.modules import wrapped_modules as wrapped_modules

HEAD = "output head; list it in modules_to_save to train it"
ROUTER = "router or gate of a mixture of experts"
STACKED = "experts are stored as {ndim}-D parameters, which take LoRA without dropout, DoRA or bias through target_parameters"
PACKED = (
    "experts are stored packed ({dtype}); load the model unquantised and pass target_parameters"
)
ATTENTION = (
    "nn.MultiheadAttention multiplies by this weight itself, so a layer around it would never run"
)
GROUPED = "a block-diagonal linear: one low-rank pair over all of its groups does not fit"
MAMBA = "Mamba's fused scan multiplies by this weight itself; PEFT refuses it"
CONVOLUTION = "a convolution, not a linear layer; name it in target_modules to adapt it"
REWRITTEN = (
    "PEFT takes a module of this name for the experts here; its weight can be reached through target_parameters, by LoRA "
    "without dropout and DoRA on an unquantised model"
)

_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_CROSS = re.compile(r"cross|encoder_attn|EncDec|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """What "all-linear" means for one model.

    Attributes:
        names: For PEFT's ``target_modules``: the shortest suffixes that match the chosen modules and nothing else; a
            regular expression where no list can be that exact.
        parameters: For PEFT's ``target_parameters``: the stacked weights of experts, and weights of linear layers that
            cannot be reached through ``target_modules``, because PEFT rewrites their names to those of the experts. Empty
            for most models.
        modules: Full names of all chosen modules, those with a weight in ``parameters`` included.
        stacks: Full names of the chosen parameters that hold the weights of all experts of a layer.
        left_out: Reason by full name, for every linear-like module and expert parameter that was not chosen.
    """

    names: list[str] | str
    parameters: list[str]
    modules: tuple[str, ...]
    stacks: tuple[str, ...]
    left_out: dict[str, str]


def all_linear(model: nn.Module) -> Selection:
    """Select every linear-like layer of the backbone: never the output head, never a router.

    Args:
        model: A base model, or one that already carries adapters (then its original layers are selected).
    """
    modules = dict(base_modules(model))
    model = modules[""]
    left_out, stacks = _experts_and_routers(modules)
    task = heads_among(modules)
    heads = {
        *task.names,
        *task.out_of_reach,
        *output_embeddings(modules),
        *outside_backbone(modules),
    }
    mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES

    chosen = []
    for name, module in modules.items():
        if isinstance(module, nn.modules.conv._ConvNd):
            left_out[name] = CONVOLUTION
        if not name or not is_linear_like(module) or name in left_out:
            continue
        parent, _, leaf = name.rpartition(".")
        if not heads.isdisjoint([name, *ancestors(name)]):
            left_out[name] = HEAD
        elif isinstance(modules.get(parent), nn.MultiheadAttention):
            left_out[name] = ATTENTION
        elif getattr(module, "n_groups", 1) > 1:
            left_out[name] = GROUPED
        elif mamba and leaf == "out_proj":
            left_out[name] = MAMBA
        else:
            chosen.append(name)

    rewritten = _names_peft_rewrites(model, {name.rpartition(".")[2] for name in chosen})
    direct = {name for name in chosen if name.rpartition(".")[2] not in rewritten}
    indirect = set()
    for name in chosen:
        if name in direct:
            continue
        weight = modules[name]._parameters.get("weight")
        if weight is not None and weight.is_floating_point():
            indirect.add(f"{name}.weight")
        else:
            left_out[name] = REWRITTEN
    parameters = {f"{name}.{own}" for name, module in modules.items() for own in module._parameters}
    others = parameters - indirect - set(stacks)
    return Selection(
        names=_shortest_entries(direct, set(modules) - direct),
        parameters=sorted(
            [*_shortest_suffixes(indirect, others), *_shortest_suffixes(set(stacks), others, 2)]
        ),
        modules=tuple(name for name in chosen if name not in left_out),
        stacks=tuple(stacks),
        left_out=left_out,
    )


def fill_targets(model: nn.Module, config: Any) -> Selection | None:
    """Write our "all-linear" into a config that leaves its targets open.

    Open means ``target_modules="all-linear"``, or a LoRA config that names no modules and no parameters. The config is
    changed in place.

    Returns:
        What was selected, or ``None`` if the config names its own targets.
    """
    if not hasattr(config, "target_modules"):
        return None
    targets = config.target_modules
    wanted = isinstance(targets, str) and targets.lower() == "all-linear"
    unsaid = targets is None and not getattr(config, "target_parameters", None)
    if not wanted and not (unsaid and config.peft_type == "LORA"):
        return None
    selection = all_linear(model)
    if selection.parameters and not _takes_parameters(config):
        lost = {
            name: REWRITTEN
            for name in selection.modules
            if any(_has_suffix(f"{name}.weight", entry) for entry in selection.parameters)
        }
        kept = tuple(name for name in selection.modules if name not in lost)
        lost |= dict.fromkeys(selection.stacks, STACKED.format(ndim=3))
        selection = Selection(selection.names, [], kept, (), {**selection.left_out, **lost})
    config.target_modules = selection.names
    if selection.parameters:
        config.target_parameters = [*(config.target_parameters or []), *selection.parameters]
    return selection


def _takes_parameters(config: Any) -> bool:
    """Whether PEFT can adapt bare parameters by this config."""
    return config.peft_type == "LORA" and not (
        config.lora_dropout or config.use_dora or config.lora_bias
    )


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether an attention reads its keys and values from another stack, by what the families call it."""
    return bool(_CROSS.search(name.rpartition(".")[2])) or "Cross" in type(module).__name__


def _experts_and_routers(modules: dict[str, nn.Module]) -> tuple[dict[str, str], list[str]]:
    """Reasons for the parts of mixture-of-experts blocks that "all-linear" does not adapt, and the stacks that it does.

    A block is whatever holds a container of experts: a child called ``experts``, or one whose class says so.
    """
    left_out: dict[str, str] = {}
    stacks: list[str] = []
    names = list(modules)
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf != "experts" and not type(module).__name__.endswith("Experts"):
            continue
        inside = {name, *_below(names, name)}
        for inner in inside:
            if not is_linear_like(modules[inner]):
                odd, whole = _stacked_weights(inner, modules[inner])
                left_out |= odd
                stacks += whole
        count = _count_experts(module)
        for other in _below(names, parent):
            beside = other.removeprefix(f"{parent}.") if parent else other
            if other not in inside and _is_router(beside, modules[other], count):
                left_out[other] = ROUTER
    return left_out, list(dict.fromkeys(stacks))


def _below(names: list[str], parent: str) -> Iterator[str]:
    """The names inside ``parent``; ``names`` lists every module before its children."""
    prefix = f"{parent}." if parent else ""
    inside = itertools.islice(names, names.index(parent) + 1, None)
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


def _names_peft_rewrites(model: nn.Module, leaves: set[str]) -> set[str]:
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


def _shortest_entries(chosen: set[str], others: set[str]) -> list[str] | str:
    entries = _shortest_suffixes(chosen, others)
    if any(_has_suffix(other, entry) for entry in entries for other in others):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return entries


def _shortest_suffixes(chosen: set[str], others: set[str], parts: int = 1) -> list[str]:
    """The shortest suffix of each chosen name, of at least so many parts, that no other name ends with; the whole name failing that."""
    taken = {suffix for other in others for suffix in suffixes(other)}
    found = {
        next((s for s in suffixes(name)[parts - 1 :] if s not in taken), name) for name in chosen
    }
    # What ends in another entry is already matched by it.
    return sorted(s for s in found if found.isdisjoint(suffixes(s)[:-1]))


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
