"""GPUs by name: memory, speed and what decides which kernels run. Numbers of the vendors' data sheets.

A GB is counted as 10**9 bytes. What the driver reports can differ: 22,587 MiB on an A10G (1 % less) and 182,631 MiB on a B200 (6 %
more). Numbers of multiprocessors of these two are those that torch reports. Products of GeForce cards are those with sums in float32,
which have half the speed of those with sums in float16 that are often quoted (RTX 5090: 838 with sparsity, so 419 without, so 209.5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftkit.errors import ContractError, short
from peftkit.machine import gpus


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Its usual name.
        memory_bytes: Its memory by the data sheet, 10**9 bytes to the GB.
        tflops: Dense products in bfloat16 with sums in float32, in 10**12 operations a second; in float16 if ``has_bf16`` is false.
        bandwidth: Memory bandwidth in 10**9 bytes a second.
        arch: As for ``peftkit_kernels.core.launch.Target``.
        sms: Streaming multiprocessors, or compute units.
        source: The data sheet.
    """

    name: str
    memory_bytes: int
    tflops: float
    bandwidth: float
    arch: str
    sms: int
    source: str

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS keeps for its own work: 64 MiB on Hopper and later (a difference measured on an H100), 16 MiB on others."""
        return 2**26 if self.arch in ("cuda:90", "cuda:100", "cuda:120") else 2**24

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.arch != "cuda:75"


def _card(
    name: str, gb: int, tflops: float, bandwidth: float, arch: str, sms: int, source: str
) -> Card:
    return Card(name, gb * 10**9, tflops, bandwidth, arch, sms, source)


CARDS = {
    card.name: card
    for card in (
        _card("T4", 16, 65, 320, "cuda:75", 40, "NVIDIA T4 datasheet, 2019"),
        _card("L4", 24, 121, 300, "cuda:89", 58, "NVIDIA L4 datasheet, 2023 (without sparsity)"),
        _card("A10G", 24, 70, 600, "cuda:86", 80, "NVIDIA A10G datasheet, 2021"),
        _card("A100-40", 40, 312, 1555, "cuda:80", 108, "NVIDIA A100 datasheet, 2021"),
        _card("A100-80", 80, 312, 2039, "cuda:80", 108, "NVIDIA A100 80GB SXM datasheet, 2021"),
        _card(
            "L40S", 48, 362, 864, "cuda:89", 142, "NVIDIA L40S datasheet, 2023 (without sparsity)"
        ),
        _card(
            "H100",
            80,
            989,
            3350,
            "cuda:90",
            132,
            "NVIDIA H100 SXM datasheet, 2023 (without sparsity)",
        ),
        _card(
            "H200",
            141,
            989,
            4800,
            "cuda:90",
            132,
            "NVIDIA H200 SXM datasheet, 2023 (without sparsity)",
        ),
        _card(
            "B200",
            180,
            2250,
            8000,
            "cuda:100",
            148,
            "NVIDIA DGX B200 datasheet, 2024 (without sparsity)",
        ),
        _card(
            "RTX 3090",
            24,
            71,
            936,
            "cuda:86",
            82,
            "NVIDIA GA102 whitepaper, 2020 (sums in float32)",
        ),
        _card(
            "RTX 4090",
            24,
            165,
            1008,
            "cuda:89",
            128,
            "NVIDIA Ada whitepaper, 2022 (sums in float32)",
        ),
        _card(
            "RTX 5090",
            32,
            209,
            1792,
            "cuda:120",
            170,
            "NVIDIA RTX Blackwell whitepaper, 2025 (sums in float32)",
        ),
        _card("MI300X", 192, 1307, 5300, "hip:gfx942", 304, "AMD Instinct MI300X datasheet, 2023"),
    )
}


def find_card(name: str) -> Card:
    """The card that ``name`` means; case, blanks and hyphens do not matter.

    Raises:
        ContractError: There is none, or more than one.
    """
    wanted = _plain(name)
    found = [card for card in CARDS.values() if _plain(card.name) == wanted]
    found = found or [card for card in CARDS.values() if wanted and wanted in _plain(card.name)]
    if len(found) != 1:
        raise ContractError(
            f"device={short(name)} is {'not clear' if found else 'unknown'}; use 'cpu', 'cuda', or one of {', '.join(CARDS)}"
        )
    return found[0]


def default_card() -> Card:
    """The card of this machine if it is one of ``CARDS``, else an H100."""
    for gpu in gpus():
        name = _plain(gpu["name"] or "")
        # "NVIDIA A100-SXM4-80GB": the longest name whose parts are all in it
        found = [
            c for c in CARDS.values() if all(_plain(part) in name for part in c.name.split("-"))
        ]
        if found:
            return max(found, key=lambda card: len(card.name))
    return CARDS["H100"]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("geforce", "").replace("nvidia", ""))
