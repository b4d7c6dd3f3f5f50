"""Predict how fast a planned step is, relative to others: the time of its products and of its memory traffic."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftkit.machine import cores, describe_machine
from peftkit.planning.cards import Card
from peftkit.planning.result import MemoryPlan

_DECODED_BYTES = 2 * 2
"""A quantised weight is written and read once more, decoded to 16 bits, for each product."""

_CYCLES = 2.5e9
_OPERATIONS = {"AVX-512": 64, "AVX2": 32}
"""Float32 operations in a cycle of a core, by instructions; 16 without them."""
_CPU_BANDWIDTH = 40e9


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device can do at most.

    Attributes:
        operations: Operations of a product in one second.
        bandwidth: Bytes read or written in one second.
    """

    operations: float
    bandwidth: float


def speed_of(card: Card | None) -> Speed:
    """The speed of a card by its data sheet; without a card that of this machine's processor, by its instructions and cores."""
    if card is not None:
        return Speed(card.tflops * 1e12, card.bandwidth * 1e9)
    instructions = re.split(r",\s*", describe_machine()["instructions"] or "")
    operations = max((_OPERATIONS.get(name, 16) for name in instructions), default=16)
    return Speed(cores() * _CYCLES * operations, _CPU_BANDWIDTH)


def step_seconds(plan: MemoryPlan, speed: Speed) -> float:
    """The seconds of a planned step if nothing but products and memory took time.

    A product with a frozen weight runs in the forward and for the gradient of its input, one with a trained weight also for the
    gradient of the weight, and with checkpointing the forward runs twice.
    """
    settings = plan.settings
    tokens = settings["batch_size"] * settings["seq_len"]
    passes = 2 + bool(settings["checkpointing"])
    operations = 2 * tokens * (passes * plan.multiplied + min(plan.trained, plan.multiplied))
    traffic = 2 * plan.allocated_bytes + passes * plan.items.get("frozen weights", 0)
    if settings["base"] in ("nf4", "int8"):
        traffic += passes * _DECODED_BYTES * plan.multiplied
    return operations / speed.operations + traffic / speed.bandwidth
