"""``fit``: settings with which a training step fits into a given memory, the fastest first."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.planning.bisection import largest_batch
from peftkit.planning.models import FULL, config_of
from peftkit.planning.planner import device_of, plan
from peftkit.planning.recipe import configs_of
from peftkit.planning.result import MemoryPlan, size_text
from peftkit.planning.roofline import speed_of, step_seconds
from peftkit.planning.step import NoCheckpointing

CONTEXT_BYTES = 600 * 2**20
"""What the driver and its libraries need on a GPU besides torch's memory."""

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_LENGTHS = (1024, 2048, 4096)
_SAMPLES = (80_000, 160_000, 240_000)
_QUANTISED = ("int8", "nf4")


@dataclass(frozen=True)
class Option:
    """Settings that fit.

    Attributes:
        plan: Their plan; ``plan.settings`` has the settings, with the ``rank`` of the adapters.
        tokens_per_second: Predicted by the data sheet of the device, without what launches and small operations cost.
        relative: The same divided by that of the fastest option.
    """

    plan: MemoryPlan
    tokens_per_second: float
    relative: float


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        budget_bytes: The memory that was given.
        options: The settings that fit, the fastest first; empty if none does.
        nearest: If none fits, the plan that needs least.
        lacking_bytes: How much more memory it needs.
    """

    budget_bytes: int
    options: list[Option]
    nearest: MemoryPlan | None = None
    lacking_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain values."""
        return {
            "budget_bytes": self.budget_bytes,
            "options": [
                {
                    **option.plan.to_dict(),
                    "tokens_per_second": option.tokens_per_second,
                    "relative": option.relative,
                }
                for option in self.options
            ],
            "nearest": self.nearest and self.nearest.to_dict(),
            "lacking_bytes": self.lacking_bytes,
        }

    def __str__(self) -> str:
        """One line for each option, or what is nearest."""
        if self.nearest is not None:
            return (
                f"nothing fits into {size_text(self.budget_bytes)}; the nearest needs "
                f"{size_text(self.nearest.reserved_bytes)}, {size_text(self.lacking_bytes)} more: {_text(self.nearest)}"
            )
        return "\n".join(
            f"{option.relative:5.2f}  {size_text(option.plan.reserved_bytes):>11}  {_text(option.plan)}"
            for option in self.options
        )


def fit(
    model: Any,
    budget: int | str | None = None,
    *,
    method: str = "lora",
    base: str | Sequence[str] | None = None,
    batch_size: int | Sequence[int] | None = None,
    seq_len: int | Sequence[int] | None = None,
    rank: int | Sequence[int] | None = None,
    checkpointing: bool | Sequence[bool] | None = None,
    optimizer: str | Sequence[str] | None = None,
    device: str | None = None,
    keep: Sequence[str] = (),
    auto_class: Any = None,
) -> Fit:
    """Search for settings with which a training step fits into ``budget``.

    Each setting can be given as one value, or as several to choose from. Only settings whose plan fits are returned, and for each
    combination of the others the largest batch.

    Args:
        model: As for ``plan``; the id, folder or config.
        budget: Memory in bytes, or with a unit: ``"24GiB"``. Default: that of the card, less what its driver needs.
        method: ``"lora"``, ``"dora"``, ``"full"``, ``"bottleneck"`` or ``"prefix"``.
        base: Kinds of base. Default: in 16 bits (32 on the CPU), ``"int8"`` and ``"nf4"``; unquantised for full fine-tuning.
        batch_size: Default: powers of two up to 64.
        seq_len: Default: 1024, 2048 and 4096, as far as the model has so many positions; 5, 10 and 15 seconds of sound at 16 kHz.
        rank: Rank, size of a bottleneck, or number of virtual tokens. Default: 16.
        checkpointing: Default: both, or ``False`` if the model does not support it.
        optimizer: Default: ``"adamw_fused"``; for full fine-tuning also ``"adamw_8bit"``.
        device: As for ``plan``.
        keep: As for ``load_base``.
        auto_class: As for ``load_base``.

    Raises:
        ContractError: An argument is unknown.
    """
    configs_of(method, 1)
    kind, card = device_of(device)
    budget_bytes = _budget(budget, card)
    source = config_of(model)
    is_full = method == FULL
    groups = itertools.product(
        _several(base, _bases(card)[:1] if is_full else _bases(card)),
        [0] if is_full else _several(rank, (16,)),
        _several(checkpointing, (False, True)),
        _several(optimizer, ("adamw_fused", "adamw_8bit") if is_full else ("adamw_fused",)),
    )
    lengths = _several(seq_len, _lengths(source))
    sizes = sorted(_several(batch_size, _BATCH_SIZES))
    found: list[MemoryPlan] = []
    smallest: MemoryPlan | None = None
    place = kind if card is None else card.name
    fixed = {"device": place, "keep": keep, "auto_class": auto_class}
    for kind_of_base, r, checkpoints, stepper in groups:
        settings = {"base": kind_of_base, "optimizer": stepper, "checkpointing": checkpoints}
        line = None
        for length in lengths:
            options = settings | fixed | {"seq_len": length}
            planned = functools.partial(_planned, model, method, r, options)
            try:
                best, least, line = largest_batch(
                    planned, sizes, budget_bytes, line and line.at_length(length)
                )
            except NoCheckpointing:
                if checkpointing is not None:
                    raise
                break
            if best is not None:
                found.append(best)
            if least is not None and (
                smallest is None or least.reserved_bytes < smallest.reserved_bytes
            ):
                smallest = least
    if not found:
        assert smallest is not None
        return Fit(budget_bytes, [], smallest, smallest.reserved_bytes - budget_bytes)
    speed = speed_of(card)
    rates = [
        p.settings["batch_size"] * p.settings["seq_len"] / step_seconds(p, speed) for p in found
    ]
    options = [Option(p, rate, rate / max(rates)) for p, rate in zip(found, rates, strict=True)]
    return Fit(budget_bytes, sorted(options, key=lambda option: -option.relative))


def _planned(
    model: Any, method: str, rank: int, options: dict[str, Any], batch_size: int
) -> MemoryPlan:
    made = plan(model, *configs_of(method, rank), batch_size=batch_size, **options)
    made.settings.update(method=method, rank=rank)
    return made


def _budget(budget: int | str | None, card: Any) -> int:
    if budget is None:
        if card is None:
            raise ContractError(
                "budget=None: the CPU has no fixed memory for a step; pass budget='16GiB', for example"
            )
        return card.memory_bytes - CONTEXT_BYTES
    if isinstance(budget, str):
        matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        if matched is None or matched[2] not in _UNITS:
            raise ContractError(
                f"budget={short(budget)} is no size; write a number with a unit, such as '24GiB' or '24GB'"
            )
        budget = int(float(matched[1]) * _UNITS[matched[2]])
    if budget <= 0:
        raise ContractError(f"budget={short(budget)} must be positive")
    return budget


def _bases(card: Any) -> tuple[str, ...]:
    """The default kinds of base: in 16 bits, or in 32 on the CPU, whose 16-bit products are slow."""
    if card is None:
        return "fp32", *_QUANTISED
    return "bf16" if card.has_bf16 else "fp16", *_QUANTISED


def _several(value: Any, default: Iterable[Any]) -> list[Any]:
    if value is None:
        return list(default)
    return [value] if isinstance(value, (str, int)) else list(value)


def _lengths(config: Any) -> list[int]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if hasattr(config, "num_feat_extract_layers"):  # Wav2Vec2 and its relatives
        return list(_SAMPLES)
    if not hasattr(text, "vocab_size"):
        return list(_LENGTHS[:1])  # images have no length
    most = getattr(text, "max_position_embeddings", None) or _LENGTHS[-1]
    return [length for length in _LENGTHS if length <= most] or [most]


def _text(plan: MemoryPlan) -> str:
    shown = ("base", "batch_size", "seq_len", "rank", "checkpointing", "optimizer")
    return ", ".join(f"{name} {plan.settings[name]}" for name in shown)
