"""Check for settings with which an adapter or a task head cannot learn."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.checks.adapters import tuner_layers
from peftkit.errors import ContractError, count, listing
from peftkit.find.heads import frozen_heads

_ALPHAS = ("lora_alpha", "alpha")


def check_strength(model: nn.Module, active: list[str]) -> None:
    """Raise if a scale of 0 or a dropout of 1 removes an active adapter from every layer.

    Args:
        model: A model with adapters.
        active: Names of the active adapters.

    Raises:
        ContractError: An adapter has no effect in any layer. The message names the adapter and the setting.
    """
    layers = list(tuner_layers(model).values())
    for adapter in active:
        config = model.peft_config[adapter]
        if _all(0.0, (_scale(layer, adapter) for layer in layers)):
            alpha = next((f for f in _ALPHAS if getattr(config, f, None) == 0), None)
            cause = (
                f"{alpha}=0" if alpha else f"every layer of adapter {adapter!r} has a scale of 0"
            )
            raise ContractError(
                f"{cause}: the adapter's output is multiplied by 0, so the adapter has no effect and cannot learn; set "
                "lora_alpha to a positive number such as twice the rank"
                if alpha
                else f"{cause}, so the adapter has no effect and cannot learn; call set_scale with another factor"
            )
        full = [
            f for f in sorted(vars(config)) if f.endswith("dropout") and _is_one(vars(config)[f])
        ]
        if not full and _all(1.0, (_dropout(layer, adapter) for layer in layers)):
            full = ["lora_dropout"]
        if full:
            raise ContractError(
                f"{full[0]}=1.0 of adapter {adapter!r}: all of the adapter's input is dropped in training, so it gets no "
                "gradient; set it to 0, or to a small probability such as 0.05"
            )


def check_heads(model: nn.Module) -> list[str]:
    """Raise if a task head with random weights is frozen.

    Returns:
        Notes on frozen heads that were loaded from a checkpoint.

    Raises:
        ContractError: A frozen head was not loaded from a checkpoint. The message names the heads.
    """
    frozen = frozen_heads(model)
    modules = dict(model.named_modules())
    loaded = [name for name in frozen if _is_loaded(_module(modules, name))]
    fresh = [name for name in frozen if name not in loaded]
    if fresh:
        leaves = sorted({name.rpartition(".")[2] for name in fresh})
        raise ContractError(
            f"{count(len(fresh), 'task head is', 'task heads are')} frozen, but the weights were not loaded from a checkpoint, "
            f"so they are random:\n{listing(fresh)}\n"
            f"Train them: pass modules_to_save={leaves} in the config (peftkit.wrap does it if the config has no "
            "modules_to_save), or set requires_grad. To keep them frozen on purpose, pass modules_to_save=[]."
        )
    return [
        f"the task head {name} is frozen; it keeps the weights of its checkpoint" for name in loaded
    ]


def _module(modules: dict[str, nn.Module], name: str) -> Any:
    """Return a module by its name without adapters."""
    return modules.get(f"base_model.model.{name}") or modules.get(name)


def _is_loaded(module: Any) -> bool:
    # transformers marks each parameter that it loads from a checkpoint
    return module is not None and any(
        getattr(parameter, "_is_hf_initialized", False) is True for parameter in module.parameters()
    )


def _scale(layer: Any, adapter: str) -> Any:
    scaling = getattr(layer, "scaling", None)
    return scaling.get(adapter) if isinstance(scaling, dict) else None


def _dropout(layer: Any, adapter: str) -> Any:
    dropout = getattr(layer, "lora_dropout", {})
    return getattr(dropout[adapter], "p", 0.0) if adapter in dropout else None


def _all(value: float, found: Any) -> bool:
    """Whether at least one layer has a value, and all layers with a value have this one. ``None`` means no value."""
    values = [one for one in found if one is not None]
    return bool(values) and all(one == value for one in values)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1
