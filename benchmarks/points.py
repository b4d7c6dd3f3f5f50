"""What the suite measures: points, each a method in one library on one model and batch, and the lists of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Point:
    """One row to measure.

    Attributes:
        case: The model, a key of ``cases.CASES``.
        method: A key of ``LIBRARIES``.
        library: The library that runs the method.
        batch: Sequences per step.
        length: Tokens per sequence.
        rank: Rank of LoRA. A bottleneck has as many parameters as LoRA of this rank, a prefix as many virtual tokens.
        adapters: Number of adapters that are loaded; the first is trained.
        checkpointing: Whether the activations of each layer are computed again in the backward.
    """

    case: str
    method: str
    library: str
    batch: int
    length: int
    rank: int = 16
    adapters: int = 1
    checkpointing: bool = False

    @property
    def provider(self) -> str:
        """The name of the row: library and method."""
        return f"{self.library} {self.method}"

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What points that are measured in turn have in common."""
        return (
            self.case,
            self.batch,
            self.length,
            self.rank,
            self.adapters,
            self.checkpointing,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields of a stored row that name the point."""
        return {**asdict(self), "provider": self.provider}


LIBRARIES = {
    "full": ("transformers", "peftkit", "Liger", "Unsloth"),
    "partial": ("transformers", "peftkit"),
    "lora": ("PEFT", "PEFT compiled", "peftkit", "Liger", "Unsloth"),
    "dora": ("PEFT", "PEFT compiled", "peftkit"),
    "qlora-nf4": ("PEFT", "PEFT compiled", "peftkit"),
    "qlora-int8": ("PEFT", "PEFT compiled", "peftkit"),
    "bottleneck": ("plain torch", "peftkit", "adapters"),
    "prefix": ("plain torch", "peftkit", "PEFT", "adapters"),
}
"""The libraries of each method. The first is its reference: every speed is shown only if the losses agree with those of the reference."""

OTHER_MATHS = {("prefix", "PEFT"), ("prefix", "adapters")}
"""Methods that compute something else in a library than the reference does. Their first run is their reference: PEFT's prefix shifts the
positions of the tokens, and AdapterHub's has other parameters."""

AXES: dict[str, tuple[Any, ...]] = {
    "length": (128, 256, 512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32, 64, 128, 256, 512),
    "adapters": (1, 2, 4, 8, 16, 32, 64),
    "case": ("llama-256", "llama-512", "llama-1024", "llama-2048"),
}
"""The values of each axis of ``scaling``. One axis changes at a time, the others stay at ``BASE``."""

SMOKE_AXES: dict[str, tuple[Any, ...]] = {
    "length": (16, 32),
    "rank": (2, 4),
    "adapters": (1, 2),
}

SMOKE_METHODS = ("full", "lora", "qlora-nf4", "prefix")
SMOKE_LIBRARIES = ("transformers", "PEFT", "plain torch", "peftkit", "Liger", "Unsloth")
"""What ``methods --smoke`` runs: each process takes 7 s of processor time for its imports, and compiling another 30 s."""

BASE = Point("llama-512", "lora", "PEFT", batch=1, length=512)
SMOKE_BASE = Point("tiny", "lora", "PEFT", batch=2, length=16, rank=4)


def of_methods(base: Point, methods: list[str], libraries: list[str] | None) -> list[Point]:
    """Every library of the methods at the sizes of ``base``. The reference of a method is always there."""
    return [
        replace(base, method=method, library=library)
        for method in methods
        for library in LIBRARIES[method]
        if libraries is None or library in libraries or library == reference_of(method, library)
    ]


def of_axes(base: Point, axes: dict[str, tuple[Any, ...]]) -> list[tuple[str, Point]]:
    """LoRA in PEFT and peftkit at each value of each axis, with the name of the axis."""
    return [
        (axis, replace(base, library=library, **{axis: value}))
        for axis, values in axes.items()
        for value in values
        for library in ("PEFT", "peftkit")
    ]


def reference_of(method: str, library: str) -> str:
    """The library whose losses a library's must equal; ``library`` itself if it computes something else."""
    return library if (method, library) in OTHER_MATHS else LIBRARIES[method][0]
