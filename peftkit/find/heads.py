"""Find task heads: modules on top of a pretrained backbone with random initial weights, which must be trained in full.

A frozen head keeps its random weights. An adapter file without the head is useless in another process, because the head gets
other random weights there.

A module outside the backbone is a head in two cases: the class of the model is that of a task (``ForTokenClassification`` and
others), or transformers loaded the backbone from a checkpoint without the module. transformers marks each parameter that it
loads. A pooler inside the backbone that was not in the checkpoint is also a head. Some modules are never a head: embeddings and
output embeddings, which are pretrained and often tied; other pretrained models; a single normalisation layer, which starts as
the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftkit.find.modules import (
    ancestors,
    base_modules,
    is_quantised,
    storage_of,
    without_adapters,
    wrapped_modules,
)
from peftkit.find.ties import other_names, sharing, tied_to

AMBIGUOUS = "the names of other modules end with the same letters, and PEFT's modules_to_save matches all of them; rename it"
QUANTISED = "its weight is quantised; load the model with this module in llm_int8_skip_modules"
SHARED = "it shares its weight with another module that is no head"
BARE = "it is a parameter of the model itself, which PEFT cannot save"

_TASKS = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|CTC|XVector|Segmentation"
    r"|ObjectDetection|(Depth|Normal|Pose)Estimation|Regression)"
)
# The parts before the head of a model that has neither a backbone module nor pretrained models as children.
_BODY = re.compile(r"(Encoder|Decoder|Backbone|Stack|Embeddings|Model)$")
# Inside a backbone, only a linear layer with one of these words in its name and one output per label is a head.
_INNER_HEAD = re.compile(r"class|cls|score|head|final|logits", re.IGNORECASE)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Heads:
    """The heads of one model.

    Attributes:
        names: Modules that PEFT can train and save; each name, as an entry of ``modules_to_save``, matches heads only.
        out_of_reach: The reason for each module or parameter of a head that PEFT cannot train, by name. Those that were loaded
            from a checkpoint are left out.
    """

    names: list[str] = field(default_factory=list)
    out_of_reach: dict[str, str] = field(default_factory=dict)


def find_heads(model: nn.Module) -> Heads:
    """Find the modules that have to be trained in full, by their names without adapters.

    Args:
        model: A model with or without adapters.

    Returns:
        The heads. Empty for language models, for pretrained models without a new head, and for modules that are not
        transformers models.
    """
    return heads_among(dict(base_modules(model)))


def frozen_heads(model: nn.Module) -> list[str]:
    """Return the names of the task heads without a trainable weight or adapter.

    The list is empty if the config of an adapter has ``modules_to_save=[]``, which freezes the heads on purpose. A list with
    other modules does not count as a purpose.

    Args:
        model: A model with or without adapters.
    """
    configs = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "modules_to_save", None) == [] for config in configs.values()):
        return []
    modules, outer = {}, {}
    for name, around, inner in wrapped_modules(model):
        modules[name], outer[name] = inner, around
    heads = heads_among(modules)
    bare = dict(modules[""].named_parameters(recurse=False))
    parameters = {
        name: [bare[name]] if name in bare else list(outer[name].parameters())
        for name in [*heads.names, *heads.out_of_reach]
    }
    return [name for name, own in parameters.items() if not any(p.requires_grad for p in own)]


def heads_among(modules: dict[str, nn.Module], never: set[str] | None = None) -> Heads:
    """Find the heads among all modules of a model; ``find_heads`` calls this.

    Args:
        modules: All modules of the model by name. The model itself is first, with an empty name.
        never: The result of ``output_embeddings``, if it is already known.
    """
    model = modules[""]
    task = _is_task_model(model)
    loaded = _has_loaded(model)
    if not task and not loaded:
        return Heads()
    never = output_embeddings(modules) if never is None else never
    names = [
        part
        for name in _outside(modules)
        if not isinstance(modules[name], nn.Embedding)
        and "Norm" not in type(modules[name]).__name__
        for part in _parts(name, modules, never)
        if task or not _has_loaded(modules[part])
    ]
    inner = _inner_heads(modules, never) if task else []
    names = names or inner
    if task and loaded:
        # Heads inside the backbone are new if the classes are others than the checkpoint's, such as that with which RT-DETR chooses its queries.
        rest = [
            name
            for name in (*inner, *_label_embeddings(modules))
            if not any(f"{name}.".startswith(f"{head}.") for head in names)
        ]
        names = [*names, *(name for name in rest if not _has_loaded(modules[name]))]
        # checkpoints of language models have none
        names += [name for name in poolers(modules) if not _has_loaded(modules[name])]
    return _within_reach(names, modules, bare=task and _backbone(modules) != "")


def output_embeddings(modules: dict[str, nn.Module]) -> set[str]:
    """Return the names of the modules that compute logits over a vocabulary, also those of nested models."""
    embeddings = {storage_of(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    found, heads = set(), set()
    for name, module in modules.items():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and storage_of(weight) in embeddings:
            found.add(name)
        if hasattr(type(module), "get_output_embeddings"):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module):
                heads.add(id(without_adapters(head)))
    return found | {name for name, module in modules.items() if id(module) in heads}


def outside_backbone(modules: dict[str, nn.Module]) -> set[str]:
    """Return the names of all modules except the backbone, its descendants and its ancestors.

    Empty if the model has no backbone.
    """
    inside = _backbone(modules)
    if not inside:
        return set()
    around = {"", inside, *ancestors(inside)}
    return {name for name in modules if not (name in around or name.startswith(f"{inside}."))}


def _backbone(modules: dict[str, nn.Module]) -> str:
    backbone = getattr(modules[""], "base_model", None)
    return next((name for name, module in modules.items() if module is backbone), "")


def _is_task_model(model: nn.Module) -> bool:
    """Whether the model's class, or a base class, is for a task with labels."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return any(map(_TASKS.search, names)) and _zero_shot_classes().isdisjoint(names)


def _zero_shot_classes() -> set[str]:
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for mapping in (
        modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for classes in mapping.values():
            names |= {classes} if isinstance(classes, str) else set(classes)
    return names


def _is_loaded(parameter: Any) -> bool:
    return getattr(parameter, "_is_hf_initialized", False) is True


def _is_quantised(module: nn.Module) -> bool:
    """Whether a weight is quantised, or belongs to a quantised linear layer but is still a plain tensor because it is new."""
    foreign = any(type(m).__module__.startswith("bitsandbytes.") for m in module.modules())
    return foreign or any(is_quantised(p) for p in module.parameters())


def _has_loaded(module: nn.Module) -> bool:
    return any(_is_loaded(parameter) for parameter in module.parameters())


def _is_pretrained(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _outside(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the topmost modules outside the backbone, or after the body of a model without a backbone module."""
    inside = _backbone(modules)
    if inside:
        around = {"", *ancestors(inside)}
        yield from (n for n in modules if n not in around | {inside} and _parent(n) in around and n)
        if _is_task_model(modules[inside]):  # a segmentation model around a detector
            below = {
                n.removeprefix(f"{inside}."): m
                for n, m in modules.items()
                if n.startswith(f"{inside}.")
            }
            yield from (f"{inside}.{name}" for name in _outside({"": modules[inside], **below}))
        return
    children = [name for name in modules if name and "." not in name]
    pretrained = [name for name in children if _is_pretrained(modules[name])]
    if not _is_pretrained(modules[""]):
        # the user's own module, with one or more pretrained models inside
        yield from (name for name in children if pretrained and name not in pretrained)
        return
    body = pretrained or [n for n in children if _BODY.search(type(modules[n]).__name__)]
    if body:
        yield from children[children.index(body[-1]) + 1 :]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _parts(name: str, modules: dict[str, nn.Module], never: set[str]) -> list[str]:
    """Return the largest modules at or below ``name`` that can be called and contain no module of ``never``."""
    module = modules[name]
    if next(module.parameters(), None) is None or _is_pretrained(module) or name in never:
        return []
    if not isinstance(module, _CONTAINERS) and never.isdisjoint(_below(name, modules)):
        return [name]
    return _parts_of_children(name, modules, never)


def _parts_of_children(name: str, modules: dict[str, nn.Module], never: set[str]) -> list[str]:
    children = [other for other in _below(name, modules) if _parent(other) == name]
    return [part for child in children for part in _parts(child, modules, never)]


def _below(name: str, modules: dict[str, nn.Module]) -> list[str]:
    return [other for other in modules if other.startswith(f"{name}.")]


def _inner_heads(modules: dict[str, nn.Module], never: set[str]) -> list[str]:
    """Return linear layers inside a backbone with one output per label, as in Perceiver and detectors that refine boxes."""
    labels = getattr(getattr(modules[""], "config", None), "num_labels", None)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and module.out_features == labels
        and name not in never
        and _INNER_HEAD.search(".".join(name.split(".")[-2:]))
    ]


def _label_embeddings(modules: dict[str, nn.Module]) -> list[str]:
    """Return embeddings inside a backbone with one row per label, or one more, as in detectors that denoise labels."""
    labels = getattr(getattr(modules[""], "config", None), "num_labels", None)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding)
        and isinstance(labels, int)
        and module.num_embeddings in (labels, labels + 1)
        and _INNER_HEAD.search(name.rpartition(".")[2])
    ]


def poolers(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the poolers of the backbone that have parameters."""
    inside = _backbone(modules)
    return [
        name
        for name, module in modules.items()
        if (inside or name) and _parent(name) == inside and "pool" in name.rpartition(".")[2]
        if next(module.parameters(), None) is not None
    ]


def _within_reach(heads: list[str], modules: dict[str, nn.Module], bare: bool) -> Heads:
    """Replace heads by their parts until each name matches heads only, and separate the parts that PEFT cannot train."""
    own = list(modules[""].named_parameters(recurse=False)) if bare else []
    if not heads and not own:
        return Heads()
    lost = {name: BARE for name, parameter in own if not _is_loaded(parameter)}
    shared = sharing(modules)
    heads = list(heads)
    for name in heads:
        # Heads that are tied are trained together; further ones are added to the list while it is read.
        together = tied_to(name, modules, shared)
        if _is_quantised(modules[name]):
            lost[name] = QUANTISED
        elif together is None:
            lost[name] = SHARED
        else:
            heads += [other for other in together if other not in heads]
    names = [name for name in heads if name not in lost]
    while (name := _first_clash(names, modules)) is not None:
        parts = _parts_of_children(name, modules, set())
        if not parts or any(p is not None for p in modules[name]._parameters.values()):
            lost[name], parts = AMBIGUOUS, []
        at = names.index(name)
        names[at : at + 1] = parts
    fresh = {n: why for n, why in lost.items() if n not in modules or not _has_loaded(modules[n])}
    # PEFT makes a copy for each name of a module, and none for a name that it does not match.
    names += [
        other
        for other, first in other_names(modules).items()
        if first in names and not any(other.endswith(name) for name in names)
    ]
    return Heads(names, fresh)


def _first_clash(names: list[str], modules: dict[str, nn.Module]) -> str | None:
    """Return a head that must be split into parts, because another module's name ends with the name of a head."""
    for name in names:
        for other in modules:
            if other.endswith(name) and other not in names:
                return next((n for n in names if other.startswith(f"{n}.")), name)
    return None
