"""Find the class of the model that a checkpoint is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftkit.errors import ContractError, short


def model_class(config: Any, auto_class: Any, path: str, hub: Mapping[str, Any], trust: Any) -> Any:
    """The class of the model: that of ``auto_class``, or the one that the config names.

    Args:
        config: The config of the checkpoint.
        auto_class: A class of transformers, an Auto class, the name of one, or ``None``.
        path: The folder or id of the checkpoint, for classes whose code it contains.
        hub: As for ``open_checkpoint``.
        trust: ``trust_remote_code``.

    Raises:
        ContractError: There is no such class.
    """
    import transformers

    if isinstance(auto_class, str):
        named = getattr(transformers, auto_class, None)
        if named is None:
            raise ContractError(f"auto_class={auto_class!r} is no class of transformers")
        auto_class = named
    if auto_class is None:
        return _of_architecture(config, path, hub, trust)
    if hasattr(auto_class, "from_config"):
        return _of_auto_class(config, auto_class, trust)
    if isinstance(auto_class, type) and issubclass(auto_class, transformers.PreTrainedModel):
        return auto_class
    raise ContractError(
        f"auto_class={short(auto_class)} is no class of a model; pass one such as transformers.AutoModelForCausalLM"
    )


def _of_architecture(config: Any, path: str, hub: Mapping[str, Any], trust: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if isinstance(reference, str) and reference.rpartition(".")[2] in names and trust:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            places = {name: value for name, value in hub.items() if name != "subfolder"}
            return get_class_from_dynamic_module(reference, path, **places)
    raise ContractError(
        f"the config of {path} names {'the architecture ' + names[0] if names else 'no architecture'}, so the class of the model is not "
        "known; pass auto_class, for example auto_class='AutoModelForCausalLM'"
    )


def _of_auto_class(config: Any, auto_class: Any, trust: Any) -> Any:
    """The class that an Auto class chooses. It is only known from a model, which is built without memory for its weights."""
    try:
        with torch.device("meta"):
            return type(auto_class.from_config(config, trust_remote_code=trust))
    except ValueError as error:
        raise ContractError(
            f"auto_class={auto_class.__name__} has no class for {type(config).__name__}: {str(error).splitlines()[0]} Use another model, or another class (the task of a recipe)"
        ) from error
