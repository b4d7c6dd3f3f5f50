"""Load adapters whose initialisation has changed the base: bring the base into that state, or raise an error."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.errors import ContractError
from peftkit.find.modules import base_modules
from peftkit.inits.initialise import initialise
from peftkit.inits.mark import FROM_WEIGHTS, Residual, mark_residual, residual_of
from peftkit.inits.parts import iterations_of
from peftkit.inits.targets import targets_of

_WAYS_OUT = (
    "Load the base that was saved with it (model.unload().save_pretrained(FOLDER) of the trained model), or save the model merged: "
    "peftkit.merge(model, OUT)"
)


def take_residual(model: nn.Module, config: Any, folder: Any) -> Residual | None:
    """Take the name of the changed base out of a loaded config, so that PEFT creates the layers without it.

    Args:
        model: The model that gets the adapter.
        config: The adapter's config; changed.
        folder: Where the adapter is, for messages.

    Returns:
        The base that the adapter belongs to, or ``None`` if PEFT repeats the initialisation rightly, or there is none to repeat.

    Raises:
        ContractError: The initialisation cannot be repeated, and PEFT would load another model.
    """
    found = residual_of(config)
    if found is not None:
        config.init_lora_weights = True
        return found
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or not hasattr(config, "loftq_config"):
        return None
    reason = None
    if iterations_of(init) is not None:
        reason = "PEFT would split the base weights with other random numbers"
    elif init == "lora_ga":
        reason = (
            "PEFT does not subtract the start from the base weights when it loads such an adapter"
        )
    elif init in ("pissa", "loftq") and any(
        type(module).__name__ in ("Linear4bit", "Linear8bitLt") for _, module in base_modules(model)
    ):
        reason = "it was trained on a base that is not quantised, whose weights it has changed"
    if reason is not None:
        raise ContractError(
            f"{folder} has init_lora_weights={init!r} and cannot be loaded on this base: {reason}. Convert the trained adapter when it is "
            "saved (save_pretrained(..., path_initial_model_for_weight_conversion=START), see PEFT's documentation), merge it, or save "
            "the changed base, load that, and set init_lora_weights to true in adapter_config.json"
        )
    return None


def restore_base(model: Any, adapter_name: str, residual: Residual) -> None:
    """Give the base the weights that the adapter was trained on, unless it has them. The adapter's factors have PEFT's default start.

    Args:
        model: A model with the adapter, before its weights are loaded; changed in place.
        adapter_name: The adapter.
        residual: What its config said.

    Raises:
        ContractError: Repeating the initialisation is impossible, or does not give the same weights.
    """
    found, _ = targets_of(model, adapter_name, replaces_weights=False)
    config = model.peft_config[adapter_name]
    mark_residual(model, config, residual.init, found)
    if residual_of(config) == residual:
        return
    if residual.init.endswith(FROM_WEIGHTS) or residual.init == "loftq":
        raise ContractError(
            f"the adapter was initialised with {residual.init!r} and needs the base weights with the fingerprint "
            f"{residual.fingerprint}, which this base does not have. {_WAYS_OUT}"
        )
    config.init_lora_weights = True
    initialise(model, residual.init, None, adapter_name)
    again = residual_of(config)
    if again != residual:
        raise ContractError(
            f"the adapter was initialised with {residual.init!r} and needs the base weights with the fingerprint {residual.fingerprint}. "
            f"Repeating the initialisation on this base and machine gave {again.fingerprint if again else 'none'}. {_WAYS_OUT}"
        )
