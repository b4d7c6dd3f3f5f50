"""Optimisers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from peftkit.errors import ContractError, short

Optimizer = Literal["adamw", "adamw_fused", "adamw_8bit", "adafactor", "sgd"]

TRAINER_NAMES: dict[str, str] = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""The names of the optimisers in transformers' ``TrainingArguments``."""

_QUANTISED_FROM = 4096
"""bitsandbytes keeps the state of a smaller tensor in float32."""

_BLOCKSIZE = 256


def require_optimizer(name: Any) -> None:
    """Raise unless ``name`` is one of ``Optimizer``.

    Raises:
        ContractError: It is not.
    """
    if name not in get_args(Optimizer):
        raise ContractError(
            f"optimizer={short(name)} is unknown; use one of {', '.join(map(repr, get_args(Optimizer)))}"
        )


def make_optimizer(name: str, parameters: Iterable[Tensor], on_gpu: bool) -> torch.optim.Optimizer:
    """The optimiser that is called ``name``, as Trainer makes it.

    Args:
        name: One of ``Optimizer``.
        parameters: What it trains.
        on_gpu: Whether torch would choose its functions for lists of tensors.
    """
    makers: dict[str, Callable[..., Any]] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=on_gpu),
        "adamw_fused": lambda p: (
            StateOnly(p, _two_moments) if on_gpu else torch.optim.AdamW(p, lr=1e-4, fused=True)
        ),
        "adamw_8bit": lambda p: StateOnly(p, _moments_in_8_bits),
        "adafactor": _adafactor,
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, foreach=on_gpu),
    }
    return makers[name](list(parameters))


def _adafactor(parameters: list[Tensor]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)


class StateOnly(torch.optim.Optimizer):
    """The memory of an optimiser that needs nothing but its state, and that cannot run here; a step changes no parameter.

    Args:
        parameters: What it trains.
        state_of: Makes the state of one parameter.
    """

    def __init__(self, parameters: list[Tensor], state_of: Callable[[Tensor], dict[str, Tensor]]):
        super().__init__(parameters, {})
        self._state_of = state_of

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the state if it is missing."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p].update(self._state_of(p))


def _two_moments(p: Tensor) -> dict[str, Tensor]:
    """Of torch's fused AdamW, which runs on real devices only."""
    return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _moments_in_8_bits(p: Tensor) -> dict[str, Tensor]:
    """Of bitsandbytes' ``AdamW8bit``, which runs on a GPU only.

    One byte for each value, and a float32 maximum for each 256 values; small tensors in float32.
    """
    if p.numel() < _QUANTISED_FROM:
        return {n: torch.zeros_like(p, dtype=torch.float32) for n in ("state1", "state2")}
    blocks = math.ceil(p.numel() / _BLOCKSIZE)
    state = {}
    for moment in ("1", "2"):
        state[f"state{moment}"] = torch.zeros_like(p, dtype=torch.uint8)
        state[f"absmax{moment}"] = p.new_zeros(blocks, dtype=torch.float32)
    return state
