"""``init_lora_weights`` of a config that ``wrap`` gets: which values PEFT can apply to the model, and which are applied afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.errors import ContractError
from peftkit.find.modules import base_modules
from peftkit.inits.initialise import Start

_ONLY_FACTORS = ("gaussian", "eva")
_NEED_DENSE = ("corda", "mica", "orthogonal")
_CLASSES = ("Linear4bit", "Linear8bitLt")


class LaterInit:
    """An initialisation that ``wrap`` applies when the adapter is in the model.

    Attributes:
        init: ``"pissa"``, ``"pissa_niter_N"``, ``"olora"`` or ``"loftq"``.
        iterations: As for ``initialise``.
    """

    def __init__(self, init: str, iterations: int):
        self.init, self.iterations = init, iterations

    def checked(self, model: nn.Module, adapter_name: str) -> Start:
        """The start of an adapter, before a weight is read or changed.

        Raises:
            ContractError: As for ``initialise``.
        """
        return Start(model, self.init, None, adapter_name, self.iterations)


def take_init(model: nn.Module, config: Any) -> LaterInit | None:
    """Take the initialisation out of a config if PEFT cannot apply it to this model, or not rightly.

    Args:
        model: The base model.
        config: A complete config; ``init_lora_weights`` becomes ``True`` if the initialisation is taken out.

    Returns:
        The initialisation, or ``None`` if PEFT applies it.

    Raises:
        ContractError: Nobody can apply it to this model.
    """
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or not hasattr(config, "loftq_config"):
        return None
    classes = {type(module).__name__ for _, module in base_modules(model)}
    quantised = [name for name in _CLASSES if name in classes]
    if quantised and init in _NEED_DENSE:
        raise ContractError(
            f"init_lora_weights={init!r} needs base weights in 16 or 32 bits, and this base has {quantised[0]} layers; use 'pissa', "
            "'pissa_niter_4', 'olora', 'loftq', 'eva' or 'gaussian', or load the base unquantised"
        )
    iterations = 1
    if init == "loftq":
        _require_loftq(config, quantised)
        iterations = config.loftq_config["loftq_iter"]
    # PEFT's OLoRA subtracts the transposed part from the weight of a Conv1D
    ours = "Conv1D" in classes if init == "olora" else bool(quantised)
    if not ours or init in _ONLY_FACTORS:
        return None
    config.init_lora_weights, config.loftq_config = True, {}
    return LaterInit(init, iterations)


def _require_loftq(config: Any, quantised: list[str]) -> None:
    if not quantised:
        raise ContractError(
            "init_lora_weights='loftq' fits the adapter to the error of a quantised base, and this base is not quantised; load it with "
            "load_base(PATH, 'nf4') or 'int8' first"
        )
    bits = config.loftq_config["loftq_bits"]
    found = 4 if "Linear4bit" in quantised else 8
    if bits != found:
        raise ContractError(
            f"loftq_bits={bits}, but the base is stored in {found} bits; pass LoftQConfig(loftq_bits={found})"
        )
