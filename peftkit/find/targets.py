"""Find the modules of "all-linear": every linear-like layer of the backbone, including stacked experts.

PEFT's own "all-linear" depends on the architecture: on mixtures of experts it adds the router, omits shared experts and doubles
ranks. peftkit's "all-linear" has the same meaning for all architectures, and gives a reason for each module that it leaves out.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.direct import weights_used_directly
from peftkit.find.experts import PACKED as PACKED
from peftkit.find.experts import ROUTER as ROUTER
from peftkit.find.experts import STACKED, experts_and_routers, names_peft_rewrites
from peftkit.find.heads import heads_among, output_embeddings, outside_backbone
from peftkit.find.layers import check_layers, wanted_layers
from peftkit.find.modules import (
    ancestors,
    base_modules,
    is_linear_like,
    is_quantised,
    suffixes,
)
from peftkit.find.modules import is_own_adapter as is_own_adapter
from peftkit.find.modules import wrapped_modules as wrapped_modules

HEAD = "output head; list it in modules_to_save to train it"
ATTENTION = "the attention uses this weight directly, so an adapter layer would never run"
GROUPED = "a block-diagonal linear layer: one low-rank pair for all of its groups does not fit"
MAMBA = "Mamba's scan uses this weight directly, so an adapter layer would never run"
INDEXER = (
    "it chooses the keys of sparse attention without a gradient, so an adapter would learn nothing"
)
CONVOLUTION = "a convolution, not a linear layer; name it in target_modules to adapt it"
REWRITTEN = (
    "PEFT reads the name of this module as that of experts; LoRA without dropout and without DoRA can adapt its weight through "
    "target_parameters, on an unquantised model"
)
NARROWED = "left out by exclude_modules, modules_to_save or layers_to_transform"

_CROSS = re.compile(r"cross|encoder_attn|EncDec|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """The result of "all-linear" for one model.

    Attributes:
        names: For PEFT's ``target_modules``: the shortest suffixes that match exactly the chosen modules, or a regular
            expression if no list of suffixes does.
        parameters: For PEFT's ``target_parameters``: the stacked weights of experts, and the weights of linear layers that
            ``target_modules`` cannot name, because PEFT rewrites their names to those of the experts. Empty for most models.
        modules: Full names of all chosen modules, including those with a weight in ``parameters``.
        stacks: Full names of the chosen parameters with the weights of all experts of a layer.
        left_out: The reason for each linear-like module and expert parameter that was not chosen, by full name.
    """

    names: list[str] | str
    parameters: list[str]
    modules: tuple[str, ...]
    stacks: tuple[str, ...]
    left_out: dict[str, str]


def all_linear(model: nn.Module, config: Any = None) -> Selection:
    """Select every linear-like layer of the backbone: never the output head, never a router.

    Args:
        model: A model with or without adapters. The names are those without adapters.
        config: A ``peft.PeftConfig`` whose ``exclude_modules``, ``modules_to_save`` and ``layers_to_transform`` narrow the
            selection down, by PEFT's rules.
    """
    modules = dict(base_modules(model))
    model = modules[""]
    admits = _Admission(config)
    left_out, stacks = experts_and_routers(modules)
    outputs = output_embeddings(modules)
    task = heads_among(modules, outputs)
    heads = {*task.names, *task.out_of_reach, *outputs, *outside_backbone(modules)}

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
        elif leaf in weights_used_directly(modules[parent]):
            left_out[name] = MAMBA if hasattr(modules[parent], "A_log") else ATTENTION
        elif any(type(modules[above]).__name__.endswith("Indexer") for above in ancestors(name)):
            left_out[name] = INDEXER
        elif getattr(module, "n_groups", 1) > 1:
            left_out[name] = GROUPED
        elif not admits(name):
            left_out[name] = NARROWED
        else:
            chosen.append(name)
    for name in [name for name in stacks if not admits(name.rpartition(".")[0])]:
        left_out[name] = NARROWED
        stacks.remove(name)

    rewritten = names_peft_rewrites(model, {name.rpartition(".")[2] for name in chosen})
    direct = {name for name in chosen if name.rpartition(".")[2] not in rewritten}
    indirect = set()
    for name in chosen:
        if name in direct:
            continue
        weight = modules[name]._parameters.get("weight")
        if weight is not None and not is_quantised(weight):
            indirect.add(f"{name}.weight")
        else:
            left_out[name] = REWRITTEN
    parameters = []
    if indirect or stacks:
        every = {f"{name}.{own}" for name, m in modules.items() for own in m._parameters}
        others = every - indirect - set(stacks)
        parameters += _shortest_suffixes(indirect, others)
        parameters += _shortest_suffixes(set(stacks), others, 2)
    leaves = {name.rpartition(".")[2] for name in direct}
    rivals = {name for name in modules if name.rpartition(".")[2] in leaves and name not in direct}
    return Selection(
        names=_shortest_entries(direct, {name for name in rivals if admits(name)}),
        parameters=sorted(parameters),
        modules=tuple(name for name in chosen if name not in left_out),
        stacks=tuple(stacks),
        left_out=left_out,
    )


class _Admission:
    """Whether PEFT would adapt a module with this name if ``target_modules`` had the last part of the name."""

    def __init__(self, config: Any):
        fields = ("exclude_modules", "modules_to_save", "layers_to_transform")
        narrowed = any(getattr(config, field, None) not in (None, [], set()) for field in fields)
        self.config = copy.copy(config) if narrowed else None

    def __call__(self, name: str) -> bool:
        from peft.tuners.tuners_utils import check_target_module_exists

        if self.config is None:
            return True
        self.config.target_modules = {name.rpartition(".")[2]}
        return bool(check_target_module_exists(self.config, name))


def fill_targets(model: nn.Module, config: Any) -> Selection | None:
    """Set the targets of a config to peftkit's "all-linear", in place, unless the config has targets.

    This is done for ``target_modules="all-linear"``, and for a LoRA config without ``target_modules`` and
    ``target_parameters``.

    Returns:
        The selection, or ``None`` if the config has targets.

    Raises:
        ContractError: No layer is left, or ``layers_to_transform`` has a layer that does not exist.
    """
    if not hasattr(config, "target_modules"):
        return None
    targets = config.target_modules
    wanted = isinstance(targets, str) and targets.lower() == "all-linear"
    unsaid = targets is None and not getattr(config, "target_parameters", None)
    if not wanted and not (unsaid and config.peft_type == "LORA"):
        return None
    if wanted_layers(config):
        check_layers(config, all_linear(model).modules)
    selection = all_linear(model, config)
    if selection.parameters and not _takes_parameters(config):
        lost = {
            name: REWRITTEN
            for name in selection.modules
            if any(_has_suffix(f"{name}.weight", entry) for entry in selection.parameters)
        }
        kept = tuple(name for name in selection.modules if name not in lost)
        lost |= dict.fromkeys(selection.stacks, STACKED.format(ndim=3))
        selection = Selection(selection.names, [], kept, (), {**selection.left_out, **lost})
    if not selection.names and not selection.parameters:
        _raise_nothing_left(model, config, selection)
    config.target_modules = selection.names
    if isinstance(selection.names, str) and wanted_layers(config):
        # the regular expression already has the layer numbers, and PEFT does not accept these fields together with it
        config.layers_to_transform = config.layers_pattern = None
    if selection.parameters:
        config.target_parameters = [*(config.target_parameters or []), *selection.parameters]
    return selection


def _raise_nothing_left(model: nn.Module, config: Any, selection: Selection) -> None:
    reasons = [f"{name}: {reason}" for name, reason in selection.left_out.items()]
    narrowed = [name for name, reason in selection.left_out.items() if reason == NARROWED]
    way_out = f"name the modules to adapt in target_modules{_convolutions(model, selection)}"
    if narrowed:
        fields = ("exclude_modules", "modules_to_save", "layers_to_transform")
        given = [f"{f}={getattr(config, f)!r}" for f in fields if getattr(config, f, None)]
        way_out = f"{' and '.join(given)} left out {len(narrowed)} of them; leave out fewer"
    raise ContractError(
        f"no linear layer of {type(model).__name__} is left to adapt; {way_out}"
        + (f":\n{listing(reasons)}" if reasons else "")
    )


def _convolutions(model: nn.Module, selection: Selection) -> str:
    """Entries of ``target_modules`` for the convolutions of the backbone that are not grouped, as part of a message."""
    modules = dict(base_modules(model))
    heads = {*heads_among(modules).names, *outside_backbone(modules)}
    plain = {
        name
        for name, reason in selection.left_out.items()
        if reason == CONVOLUTION
        and getattr(modules[name], "groups", 1) == 1
        and heads.isdisjoint([name, *ancestors(name)])
    }
    if not plain:
        return ""
    entries = _shortest_entries(plain, modules.keys() - plain)
    if len(repr(entries)) > 300:
        return ""
    return f". For its convolutions, target_modules={entries!r}"


def _takes_parameters(config: Any) -> bool:
    """Whether PEFT can adapt single parameters with this config."""
    return config.peft_type == "LORA" and not (
        config.lora_dropout or config.use_dora or config.lora_bias
    )


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether an attention gets keys and values from another stack, judged by the names that model families use."""
    return bool(_CROSS.search(name.rpartition(".")[2])) or "Cross" in type(module).__name__


def _shortest_entries(chosen: set[str], others: set[str]) -> list[str] | str:
    entries = _shortest_suffixes(chosen, others)
    if any(_has_suffix(other, entry) for entry in entries for other in others):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return entries


def _shortest_suffixes(chosen: set[str], others: set[str], parts: int = 1) -> list[str]:
    """Return the shortest suffix of each chosen name that no other name has, with at least ``parts`` parts.

    If there is no such suffix, the whole name is used.
    """
    taken = {suffix for other in others for suffix in suffixes(other)}
    found = {
        next((s for s in suffixes(name)[parts - 1 :] if s not in taken), name) for name in chosen
    }
    # An entry that ends with another entry is redundant, because that entry matches the same modules.
    return sorted(s for s in found if found.isdisjoint(suffixes(s)[:-1]))


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
