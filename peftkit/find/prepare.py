"""Check the arguments of ``wrap`` and fill in missing fields of the configs, before the model is changed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.heads import Heads, find_heads
from peftkit.find.matching import check_targets
from peftkit.find.modules import base_modules, is_adapted
from peftkit.find.targets import fill_targets
from peftkit.find.values import check_tokens, check_values, kind_of

_LANGUAGE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# PEFT's classes for these tasks pass input_ids, inputs_embeds and labels to the model.
_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", *_LANGUAGE)
_TASK_OF_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def check_arguments(model: Any, configs: tuple[Any, ...], adapter_name: Any) -> None:
    """Raise unless ``wrap`` got a model without adapters, configs, and a usable adapter name.

    Raises:
        TypeError: An argument has the wrong type, such as the name of a model or a dict, or the arguments are swapped.
        ValueError: The model already has adapters, or PEFT cannot use the name of the adapter.
    """
    _check_model(model)
    for config in configs:
        _check_config(config)
    _check_adapter_name(adapter_name, configs)
    if any(is_adapted(module) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} already has adapters; add another adapter with model.add_adapter, or fuse the "
            "existing adapters with peftkit.accelerate(model)"
        )


def _check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, PeftConfig):
        raise TypeError(
            f"the first argument is a {type(model).__name__}, but it must be the model; call wrap(model, config)"
        )
    if isinstance(model, str):
        way_out = f"load the model first, such as AutoModelForCausalLM.from_pretrained({model!r})"
    elif model is None:
        way_out = "pass a loaded model; a function that builds it may lack its return"
    elif isinstance(model, type):
        way_out = f"pass an instance, such as {model.__name__}.from_pretrained(...)"
    elif isinstance(getattr(model, "model", None), nn.Module):
        way_out = "pass its .model"
    else:
        way_out = "pass a torch.nn.Module, such as a loaded transformers model"
    raise TypeError(f"model={_shortened(model)} is not a model but {_kind(model)}; {way_out}")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else kind_of(value)


def _shortened(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_config(config: Any) -> None:
    if isinstance(config, PeftConfig):
        if getattr(config, "peft_type", None) is None:
            raise ValueError(
                f"this {type(config).__name__} has no method; pass the config of a method, such as peft.LoraConfig(r=16)"
            )
        return
    if isinstance(config, nn.Module):
        raise TypeError(
            f"one of the configs is a model, {type(config).__name__}; call wrap(model, config)"
        )
    if config is None:
        way_out = "leave it out to get LoRA with r=16"
    elif isinstance(config, type) and issubclass(config, PeftConfig):
        way_out = f"pass an instance: {config.__name__}()"
    elif isinstance(config, Mapping):
        inner = ", ".join(f"{key}={_shortened(value)}" for key, value in config.items())
        way_out = f"pass a config, such as peft.LoraConfig({inner})"
    elif isinstance(config, (list, tuple)):
        way_out = "pass configs one by one: wrap(model, first, second)"
    elif isinstance(config, str):
        way_out = (
            "pass a config, such as peft.LoraConfig(r=16); pass the name of the adapter as adapter_name, and load a saved "
            "adapter with peftkit.load_adapter"
        )
    else:
        way_out = "pass a peft.PeftConfig, such as peft.LoraConfig(r=16)"
    raise TypeError(f"config={_shortened(config)} is not a config but {_kind(config)}; {way_out}")


def _check_adapter_name(name: Any, configs: tuple[Any, ...]) -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if not isinstance(name, str):
        raise TypeError(f"adapter_name={_shortened(name)} is {kind_of(name)}; it must be a string")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        reason = (
            "is empty"
            if not name
            else "has a dot in it"
            if "." in name
            else "is an attribute of torch.nn.ModuleDict"
        )
        raise ValueError(
            f"adapter_name={name!r} {reason}, so PEFT cannot use it as a module name; pass another name, such as 'default'"
        )
    methods = [config.peft_type for config in configs] or [PeftType.LORA]
    for prefix in (PEFT_TYPE_TO_PREFIX_MAPPING.get(method) for method in methods):
        if prefix and name in prefix:
            raise ValueError(
                f"adapter_name={name!r} is part of {prefix!r}, the start of the parameter names of this method, so PEFT could "
                "not load the adapter again; pass another name, such as 'default'"
            )


def complete(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """Check a config for a model, and fill in heads and targets, in place.

    Returns:
        ``config``.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or the task does not fit the model.
        ContractError: An entry matches nothing, or PEFT cannot train a head that has to be trained.
    """
    check_values(config)
    check_task(model, config.task_type)
    check_tokens(model, config)
    fill_heads(model, config)
    fill_targets(model, config)
    check_targets(model, config)
    return config


def fill_heads(model: nn.Module, config: Any) -> None:
    """Set ``config.modules_to_save`` to the task heads, unless it is set (also if it is ``[]``).

    A head that an entry of ``target_modules`` names explicitly gets an adapter instead.

    Raises:
        ContractError: PEFT cannot train a part of the head.
    """
    if not hasattr(config, "modules_to_save") or config.modules_to_save is not None:
        return
    heads = find_heads(model)
    if heads.out_of_reach:
        _raise_out_of_reach(model, heads)
    names = [name for name in heads.names if not _is_target(name, model, config)]
    if names:
        config.modules_to_save = names


def _raise_out_of_reach(model: nn.Module, heads: Heads) -> None:
    reasons = [f"{name}: {reason}" for name, reason in heads.out_of_reach.items()]
    raise ContractError(
        f"PEFT cannot train these parts of the head of {type(model).__name__}, which may have random initial weights:\n"
        f"{listing(reasons)}\nPass modules_to_save={heads.names} to train only the other parts and keep these unchanged, or "
        "tune the model without an adapter (strategy=full or strategy=partial of peftkit train)."
    )


def _is_target(head: str, model: nn.Module, config: Any) -> bool:
    """Whether an entry of ``target_modules`` matches only this head or modules inside it."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) or not targets:
        return False
    for entry in targets:
        found = [n for n, _ in base_modules(model) if n == entry or n.endswith(f".{entry}")]
        if found and all(name == head or name.startswith(f"{head}.") for name in found):
            return True
    return False


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's task type for the model's class, or None.

    It is None for an unknown class, and for a model that does not accept the arguments that PEFT passes for this task.
    """
    task = _task_of_class(model)
    fits = task in ("CAUSAL_LM", "SEQ_CLS") and _takes_text(model)
    return task if fits else None


def _task_of_class(model: nn.Module) -> str | None:
    for cls in type(model).__mro__:
        for ending, task in _TASK_OF_CLASS.items():
            if cls.__name__.endswith(ending):
                return task
    generates = hasattr(model, "prepare_inputs_for_generation")
    if generates and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return None


def _takes_text(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "input_ids" in parameters or not hasattr(model, "base_model_prefix")


def check_task(model: nn.Module, task: str | None) -> None:
    """Raise if PEFT's class for this task cannot run the model.

    Raises:
        ValueError: The model's class is for another task, or does not accept the arguments that PEFT passes.
    """
    if task not in _TEXT:
        return
    kind = type(model).__name__
    own = _task_of_class(model)
    if own is not None and own != task:
        raise ValueError(
            f"task_type={task!r} does not fit {kind}, whose task is {own}; leave task_type out, or load the model with a class "
            f"for {task}"
        )
    if task in _LANGUAGE and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"task_type={task!r} does not fit {kind}, which cannot generate; leave task_type out"
        )
    if task not in _LANGUAGE and re.search(
        r"For(MaskedLM|ConditionalGeneration|PreTraining)$", kind
    ):
        raise ValueError(
            f"task_type={task!r} does not fit {kind}, which has no head for this task; leave task_type out"
        )
    if not _takes_text(model):
        raise ValueError(
            f"task_type={task!r}: PEFT would call {kind} with input_ids, which its forward does not accept; leave task_type "
            "out; peftkit still trains the head"
        )
