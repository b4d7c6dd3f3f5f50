"""The largest memory in each part of a training step, and what it consists of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.planning.ledger import Block, Event

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_KINDS = {
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "MLP": re.compile(r"mlp|ffn|feed_?forward|experts|moe|intermediate|dense|fc\d", re.IGNORECASE),
    "norms": re.compile(r"norm|ln_", re.IGNORECASE),
    "embeddings": re.compile(r"embed|wte|wpe", re.IGNORECASE),
    "logits and loss": re.compile(r"head|score|classifier|predictions", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Section:
    """The moment of the largest memory in one part of a step.

    Attributes:
        size: Bytes.
        items: Bytes by what they hold; the sum is ``size``.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        module: Name of the module that ran.
    """

    size: int
    items: dict[str, int]
    phase: str
    module: str


def sections(
    before: Sequence[Block], events: Iterable[Event], ends: int = 0, layers: int = 0
) -> dict[Any, Section]:
    """Find the sections of a recorded step.

    Args:
        before: The memory in use before the first event.
        events: What happened then.
        ends: Layers at each end of the model that are sections of their own. Layers between them have none.
        layers: Number of layers of the model; 0 to treat all layers as one section.
    """
    items: Counter[str] = Counter()
    for block in before:
        items[_item(block)] += block.size
    total = sum(items.values())
    found: dict[Any, Section] = {}
    for event in events:
        total += event.change
        items[_item(event.block)] += event.change
        if event.change < 0:
            continue
        place = _place(event.module, ends, layers)
        key = event.phase, place
        if place != "between" and (key not in found or total > found[key].size):
            held = {name: size for name, size in items.items() if size}
            found[key] = Section(total, held, event.phase, event.module)
    return found


def extended(
    few: dict[Any, Section], more: dict[Any, Section], times: int, added: int
) -> list[Section]:
    """The sections of a model that has the layers by which ``more`` is larger than ``few`` ``times`` times instead of once.

    Every number is linear in the layers between both ends of the model.

    Args:
        few: The sections of a model.
        more: Those of a model with more layers.
        times: The factor.
        added: By how many layers the result is larger than ``more``.
    """
    result = []
    for key, section in more.items():
        old = few[key]
        names = {**old.items, **section.items}
        items = {
            name: old.items.get(name, 0)
            + times * (section.items.get(name, 0) - old.items.get(name, 0))
            for name in names
        }
        size = old.size + times * (section.size - old.size)
        module, number = section.module, layer_of(section.module)
        if number is not None and key[1][0] == "last":
            module = _NUMBER.sub(f".{number + added}", module, count=1)
        result.append(Section(size, items, section.phase, module))
    return result


def largest(found: Iterable[Section]) -> Section:
    """The section with the peak."""
    return max(found, key=lambda section: section.size)


def layer_of(module: str) -> int | None:
    """The number of the layer in the name of a module, or ``None``."""
    number = _NUMBER.search(module)
    return int(number[1]) if number else None


def _place(module: str, ends: int, layers: int) -> Any:
    number = layer_of(module)
    if not layers or number is None:
        return "outside"
    if number < ends:
        return "first", number
    if layers - number <= ends:
        return "last", layers - number
    return "between"


def _item(block: Block) -> str:
    """What a block holds."""
    if block.label:
        return block.label
    if block.phase == OPTIMIZER:
        return "temporary, optimizer"
    kind = _kind(block.module)
    if block.phase == BACKWARD:
        return "gradients of activations"
    if kind == "logits and loss":
        return kind
    if block.until in ("", FORWARD):
        return "temporary, forward"
    return f"activations: {kind}"


def plain_name(module: str) -> str:
    """The name of a module without what PEFT puts before it; empty for the model itself."""
    return re.sub(r"^base_model(\.model)?\.?", "", module)


def _kind(module: str) -> str:
    name = plain_name(module)
    if not name:
        return "logits and loss"
    for part in reversed(name.split(".")):
        for kind, pattern in _KINDS.items():
            if pattern.search(part):
                return kind
        if part.isdigit():
            return "layers"
    return "other"
