"""Adapters whose base weights were changed: how their config names the base that they need.

PEFT stores ``init_lora_weights`` and repeats the initialisation when it loads an adapter. On another base, or with other random numbers,
the result would be another model, without an error. Here the field names the changed base by its fingerprint. PEFT does not know the
word, so it raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peftkit.errors import ContractError
from peftkit.inits.targets import Target
from peftkit.inits.weights import fingerprint

FROM_WEIGHTS = "+weights"
"""Follows the name of an initialisation that read the original weights, which loading an adapter cannot repeat."""

_WORD = "residual"


class Residual(NamedTuple):
    """What the config of an adapter says about its base.

    Attributes:
        init: The initialisation that changed the base.
        fingerprint: That of the changed weights.
    """

    init: str
    fingerprint: str


def is_marked(config: Any) -> bool:
    """Whether the adapter belongs to a base that was changed by ``initialise``."""
    return residual_of(config) is not None


def residual_of(config: Any) -> Residual | None:
    """The changed base that an adapter belongs to, or ``None``."""
    value = getattr(config, "init_lora_weights", None)
    parts = value.split(":") if isinstance(value, str) else []
    return Residual(*parts[1:]) if len(parts) == 3 and parts[0] == _WORD else None


def mark_residual(model: Any, config: Any, init: str, targets: Mapping[str, Target]) -> None:
    """Write the fingerprint of the changed base into the adapter's config.

    On a quantised base PEFT's conversion to plain LoRA (``path_initial_model_for_weight_conversion``) is refused from now on: the residual was
    quantised again, and the converted adapter would lack the rounding on the unchanged base.
    """
    digits = fingerprint((name, target.weight) for name, target in targets.items())
    config.init_lora_weights, config.loftq_config = f"{_WORD}:{init}:{digits}", {}
    if any(target.weight.is_quantised for target in targets.values()):
        getattr(model, "base_model", model).__dict__["subtract_mutated_init"] = _Refused(init)


class _Refused:
    """Replaces PEFT's ``subtract_mutated_init`` of one model."""

    def __init__(self, init: str):
        self.init = init

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ContractError(
            f"path_initial_model_for_weight_conversion: this adapter was initialised with {self.init!r} on a quantised base, whose residual "
            "was quantised again. A converted adapter would lack that rounding on the unchanged base and compute something else. Save the "
            "changed base with the adapter (model.save_pretrained(...); model.unload().save_pretrained(...)), or merge them: "
            "peftkit.merge(model, OUT)"
        )
