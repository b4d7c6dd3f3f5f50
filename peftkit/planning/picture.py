"""A plan as a picture: one stacked bar with the memory of the card, as SVG or PNG, or on a page with the numbers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from peftkit.machine import describe_machine
from peftkit.planning.cards import CARDS
from peftkit.report_page import (
    Part,
    Stack,
    Tile,
    figure,
    page,
    paragraph,
    section,
    table,
    tiles,
    write_page,
)

if TYPE_CHECKING:
    from peftkit.planning.result import MemoryPlan

_ORDER = (
    "frozen weights",
    "trained weights",
    "batch",
    "gradients",
    "optimizer state",
    "activations",
    "gradients of activations",
    "logits and loss",
    "temporary",
    "workspaces",
    "other",
)
"""The starts of the items' names, in the order of the bar."""


def chart(plan: MemoryPlan) -> Stack:
    """The memory at the peak as a stacked bar, with the memory of the card or of this machine as a line."""
    from peftkit.planning.result import size_text

    rows = sorted(plan.rows(), key=lambda row: _place(row[0]))
    overhead = plan.reserved_bytes - plan.peak_bytes
    if overhead > 0:
        rows.append(("space of the allocator", overhead))
    parts = [Part(name, float(size), size_text(size)) for name, size in rows]
    marks = []
    device = device_memory(plan)
    if device is not None:
        marks.append(Part(device[0], float(device[1]), size_text(device[1])))
    return Stack("Memory of a training step at its peak", parts, marks)


def device_memory(plan: MemoryPlan) -> tuple[str, int] | None:
    """The name and the memory of the device of a plan; ``None`` if its memory is not known."""
    name = plan.settings.get("device")
    if name in CARDS:
        return name, CARDS[name].memory_bytes
    if name != "cpu":
        return None
    machine = describe_machine()
    sizes = [machine[key] for key in ("memory_bytes", "memory_limit_bytes") if machine[key]]
    return ("this machine", min(sizes)) if sizes else None


def write_plan(plan: MemoryPlan, path: str | os.PathLike[str]) -> None:
    """Write the page of a plan.

    Raises:
        OSError: The file cannot be written.
    """
    write_page(path, to_page(plan))


def to_page(plan: MemoryPlan) -> str:
    """The page of a plan."""
    from peftkit.planning.result import size_text

    settings = plan.settings
    found = [Tile(size_text(plan.reserved_bytes), "needed for a training step", wide=True)]
    device = device_memory(plan)
    if device is not None:
        name, size = device
        verdict = "fits" if plan.fits(size) else "does NOT fit"
        found.append(Tile(verdict, f"into {name} with {size_text(size)}"))
    found.append(Tile(size_text(plan.loaded_bytes), "before the first step"))
    share = plan.trained / plan.parameters
    found.append(Tile(f"{share:.2%}", f"of {plan.parameters:,} parameters are trained"))
    where = f", in {plan.module}" if plan.module else ""
    basis = (
        "The same code allocates in a real run on this processor."
        if plan.basis == "CPU"
        else "This is a prediction: a GPU's own buffers follow rules."
    )
    rows = [(name, size_text(size), f"{size / plan.peak_bytes:.1%}") for name, size in plan.rows()]
    phases = [(phase, size_text(size)) for phase, size in plan.peaks.items()]
    shown = [(n.replace("_", " "), v) for n, v in settings.items() if v is not None]
    return page(
        f"Memory plan of {settings.get('model', 'a model')}",
        tiles(found),
        figure(chart(plan), f"The peak is in the {plan.phase}{where}. {basis}"),
        section("What the memory holds", table(["", "size", "share of the peak"], rows)),
        section("The most memory in each phase", table(["phase", "size"], phases)),
        section("What was planned", table(["", ""], shown, words=True)),
        paragraph(
            "Sizes are those of one batch of this length without padding. The first step makes the optimiser's state, which the "
            "later steps keep.",
            note=True,
        ),
    )


def _place(name: str) -> tuple[int, str]:
    places = [i for i, start in enumerate(_ORDER) if name.startswith(start)]
    # "gradients of activations" starts with "gradients" too: the last match is the longest
    return (max(places) if places else len(_ORDER), name)
