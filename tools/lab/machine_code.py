"""Reads the machine code of one kernel: registers, spills, access widths, tensor instructions, and the problems they show."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lab.devices import A100, H100, LIMITS, Device, Occupancy, occupancy

_TENSOR_OPS = frozenset(
    "HMMA HGMMA UTCHMMA UTCQMMA IMMA IGMMA UTCIMMA QGMMA QMMA OMMA DMMA".split()
)
_SPILLS = ("LDL", "STL")


class Stream(NamedTuple):
    """A kernel whose loop streams tensors.

    Attributes:
        tile: The constants whose product is the size of its tile.
        loads: Tiles that it loads in each step.
        stores: Tiles that it stores in each step.
        loops: The number of loops over the same tiles among which its loads and stores are divided.
        beside: The constants of another tile that a step loads, which is also in flight.
        instruction_bound: Values of constants with which instructions, not DRAM, limit the kernel; its README says so.
    """

    tile: tuple[str, ...]
    loads: int
    stores: int = 0
    loops: int = 1
    beside: tuple[str, ...] = ()
    instruction_bound: dict[str, tuple[Any, ...]] | None = None


_GELU_WITH_DROPOUT = {"ACT": ("gelu", "gelu_tanh"), "DROPOUT": (True,)}
STREAMS = {
    "shrink_kernel": Stream(("BLOCK_M", "BLOCK_K"), 1),
    "tall_kernel": Stream(("BLOCK_M", "BLOCK_C"), 1),
    "gate_forward_kernel": Stream(
        ("BLOCK_M", "BLOCK_F"), 2, 1, instruction_bound=_GELU_WITH_DROPOUT
    ),
    "gate_backward_kernel": Stream(
        ("BLOCK_M", "BLOCK_F"),
        3,
        2,
        beside=("BLOCK_M", "BLOCK_R"),
        instruction_bound=_GELU_WITH_DROPOUT,
    ),
    # two loops over the rows: DRAM reads happen in the first, DRAM writes in the second
    "bottleneck_forward_kernel": Stream(
        ("BLOCK_M", "BLOCK_D"), 1, 1, loops=2, beside=("BLOCK_D", "BLOCK_R")
    ),
    "bottleneck_backward_kernel": Stream(
        ("BLOCK_M", "BLOCK_D"), 1, 1, loops=2, beside=("BLOCK_D", "BLOCK_R")
    ),
    "norm_forward_kernel": Stream(("BLOCK_M", "BLOCK_K"), 1, 1),
    "norm_backward_kernel": Stream(("BLOCK_M", "BLOCK_K"), 2, 1),
    # without a trained magnitude it loads one tile, but twice as many programs are resident
    "scale_backward_kernel": Stream(("BLOCK_M", "BLOCK_N"), 2, 1),
    "scaled_gate_backward_kernel": Stream(("BLOCK_M", "BLOCK_F"), 3, 2),
    # only the few programs with rows of an adapter read its factor, so in decoding factors are most of the streamed bytes
    "grouped_shrink_kernel": Stream(("BLOCK_M", "BLOCK_K"), 1, beside=("BLOCK_K", "BLOCK_R")),
    "grouped_tall_kernel": Stream(("BLOCK_M", "BLOCK_C"), 1),
}

_MIN_BYTES_IN_FLIGHT = 16 * 1024
"""Little's law on H100: 25 GB/s for each multiprocessor times 0.65 microseconds of latency."""
_MIN_DRAM_MARGIN = 1.1
_STREAMING_RANK = 64
"""Above this rank a pass does more than 128 FLOPs for each byte, as many as an A100 computes while it moves a byte, so products limit it."""


@dataclass
class Report:
    """Properties of the machine code of one kernel on one target.

    Attributes:
        kernel: Name of the kernel.
        config: Its constants, warps and stages, in words.
        arch: The target.
        error: Why it did not compile; empty if it did.
        registers: Registers of a thread.
        stack_bytes: Local memory reserved for a thread.
        spills: Instructions that load or store local memory.
        instructions: Instructions of the whole kernel, loops counted once; 0 if not known (AMD).
        shared_bytes: Shared memory of a block, static and dynamic.
        warps: Warps of a block.
        dots: Products in the source that tensor cores support: 16-bit, int8, TF32.
        constants: The constexpr arguments.
        itemsize: Bytes of an element of the first tensor.
        aligned: Whether rows of the streamed tensors start and end at multiples of 16 elements. Other rows are read element by
            element: instructions, not DRAM, limit that, so the checks of streams do not apply.
        tensor_instructions: Tensor-core instructions by name.
        loads: Global loads by bits of an access; ``"TMA"`` for bulk copies.
        stores: Global stores by bits of an access.
        loops: Instructions of each innermost loop, by name: loops of the source, and on sm_100 also loops that wait.
        has_loop: Whether the source has a loop.
    """

    kernel: str
    config: str
    arch: str
    error: str = ""
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    instructions: int = 0
    shared_bytes: int = 0
    warps: int = 0
    dots: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    itemsize: int = 2
    aligned: bool = True
    tensor_instructions: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    loops: list[Counter[str]] = field(default_factory=list)
    has_loop: bool = True

    @property
    def occupancy(self) -> Occupancy | None:
        """Resident blocks; ``None`` if not known (AMD)."""
        if self.arch not in LIMITS or self.error:
            return None
        return occupancy(self.arch, self.registers, self.warps, self.shared_bytes)

    def problems(self) -> list[str]:
        """The reasons not to ship this kernel, one sentence each."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        # ptxas may reserve a stack frame that no instruction uses, for example for pairs of codes that Triton 3.7 builds in
        # one but keeps in registers
        if self.spills or (self.stack_bytes and not self.arch.startswith("cuda")):
            found.append(f"spills: {self.stack_bytes} bytes of stack, {self.spills} instructions")
        if self.occupancy is not None and not self.occupancy.blocks:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, more than a block has")
        if self.dots and not self.tensor_instructions:
            found.append(f"has {self.dots} dots and no tensor-core instruction")
        if self.aligned:
            found += self._stream_problems()
        return found

    def _stream_problems(self) -> list[str]:
        found = []
        # a kernel without a loop reads little and writes much, so its stores may be the wide accesses
        widths = self.loads if self.has_loop else self.loads + self.stores
        # an AMD wave has 64 lanes, so it moves as many bytes with 64 bits for each lane as a warp with 128 bits
        enough = {"128", "TMA"} if self.arch.startswith("cuda") else {"128", "64"}
        if not enough & widths.keys():
            found.append(f"has no 128-bit access, only {dict(widths)}")
        if self.bytes_in_flight is not None and self.bytes_in_flight < _MIN_BYTES_IN_FLIGHT:
            found.append(
                f"keeps {self.bytes_in_flight} bytes in flight on each multiprocessor, too few"
            )
        margin = self.dram_margin
        if margin is not None and margin < _MIN_DRAM_MARGIN and not self._instruction_bound():
            found.append(f"streams at {margin:.2f} of DRAM bandwidth: instruction-bound")
        return found

    @property
    def bytes_in_flight(self) -> int | None:
        """Bytes that the resident programs of one multiprocessor load in a loop step, for streaming kernels on H100."""
        stream = STREAMS.get(self.kernel)
        if stream is None or self.arch != H100.arch or self.occupancy is None:
            return None
        if self._exact_float32:
            return None
        elements = self._elements(stream.tile) * stream.loads
        if stream.beside:
            elements += self._elements(stream.beside)
        return self.occupancy.blocks * elements * self.itemsize

    @property
    def dram_margin(self) -> float | None:
        """Instruction throughput of the main loop divided by DRAM bandwidth, for streaming kernels on A100 and H100."""
        device = {d.arch: d for d in (A100, H100)}.get(self.arch)
        stream = STREAMS.get(self.kernel)
        if stream is None or device is None or not self.loops:
            return None
        if self.constants.get("BLOCK_R", 0) > _STREAMING_RANK or self._exact_float32:
            return None
        elements = self._elements(stream.tile) / (32 * self.warps)
        longest = sorted(self.loops, key=lambda loop: sum(loop.values()))[-stream.loops :]
        loop = sum(longest, Counter[str]())
        return dram_margin(loop, device, elements, self.itemsize * (stream.loads + stream.stores))

    @property
    def loop_clocks(self) -> int | None:
        """Lower bound on the clocks of one iteration of the largest innermost loop; ``None`` without one, or on AMD."""
        return max((clocks(loop)[0] for loop in self.loops), default=None)

    @property
    def _exact_float32(self) -> bool:
        """Whether exact float32 products, which no tensor core supports, limit the kernel."""
        return self.itemsize == 4 and self.constants.get("PRECISION") == "ieee"

    def _instruction_bound(self) -> bool:
        # float32 factors with 16-bit activations need three products instead of one; a mask or a rank above 16 adds to them,
        # or the factor is split into its parts for only 16 rows
        mixed = self.constants.get("PRECISION") == "halves"
        few_rows = self.kernel.startswith("grouped_") and self.constants.get("BLOCK_M") == 16
        if mixed and (self.constants.get("DROPOUT") or self.constants["BLOCK_R"] > 16 or few_rows):
            return True
        known = STREAMS[self.kernel].instruction_bound
        return known is not None and all(self.constants[k] in known[k] for k in known)

    def _elements(self, tile: tuple[str, ...]) -> int:
        return math.prod(self.constants[name] for name in tile)

    def row(self) -> dict[str, Any]:
        """The report as plain data, for tables and JSON."""
        return {
            "kernel": self.kernel,
            "config": self.config,
            "arch": self.arch,
            "error": self.error,
            "registers": self.registers,
            "stack": self.stack_bytes,
            "spills": self.spills,
            "instructions": self.instructions,
            "shared_bytes": self.shared_bytes,
            "aligned": self.aligned,
            "occupancy": None if self.occupancy is None else round(self.occupancy.fraction, 3),
            "tensor_instructions": dict(self.tensor_instructions),
            "load_widths": dict(self.loads),
            "store_widths": dict(self.stores),
            "bytes_in_flight": self.bytes_in_flight,
            "loop_clocks": self.loop_clocks,
            "dram_margin": None if self.dram_margin is None else round(self.dram_margin, 2),
            "problems": self.problems(),
        }


_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M
)


def read_nvidia(report: Report, cubin: bytes) -> None:
    """Fill in ``report`` from a compiled kernel, with the ``cuobjdump`` of the Triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, text = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump -res-usage printed {usage!r}"
    registers, stack, shared, local = map(int, found.groups())
    report.registers, report.stack_bytes = registers, stack + local
    report.shared_bytes = report.shared_bytes or shared
    read_sass(report, text)


def read_sass(report: Report, text: str) -> None:
    """Count the instructions of a disassembly."""
    code = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(text)]
    report.instructions = sum(op != "NOP" for _, op, _ in code)
    for _, op, _ in code:
        name = op.split(".")[0]
        if name in _SPILLS:
            report.spills += 1
        elif name in _TENSOR_OPS:
            report.tensor_instructions[name] += 1
        elif name in ("LDG", "LDGSTS", "UTMALDG"):
            report.loads["TMA" if name == "UTMALDG" else _bits(op)] += 1
        elif name in ("STG", "UTMASTG"):
            report.stores["TMA" if name == "UTMASTG" else _bits(op)] += 1
    report.loops = _innermost_loops(code)


def _bits(op: str) -> str:
    found = re.search(r"\.[US]?(8|16|64|128)\b", op)
    return found.group(1) if found else "32"


def _innermost_loops(code: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """Instructions of the innermost loops. A backward branch is the end of a loop."""
    spans = []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target.group(1), 16) < at:
            spans.append((int(target.group(1), 16), at))
    inner = [
        (first, last)
        for first, last in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    return [
        Counter(op.split(".")[0] for at, op, _ in code if first <= at <= last and op != "NOP")
        for first, last in inner
    ]


def read_amd(report: Report, text: str) -> None:
    """Fill in ``report`` from an AMD assembly listing, whose register count includes the accumulation registers."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    report.registers = number("vgpr_count")
    report.stack_bytes = number("private_segment_fixed_size")
    report.spills = number("vgpr_spill_count")
    report.shared_bytes = report.shared_bytes or number("group_segment_fixed_size")
    for op in re.findall(r"^\s+((?:v|global|buffer)_[a-z0-9_]+)", text, re.M):
        if "mfma" in op:
            report.tensor_instructions["MFMA"] += 1
        elif found := re.match(r"(?:global|buffer)_(load|store)_([a-z0-9]+)", op):
            widths = report.loads if found.group(1) == "load" else report.stores
            widths[_AMD_BITS.get(found.group(2), found.group(2))] += 1


_AMD_BITS = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16"}

# the pipes of one multiprocessor sub-partition that execute a warp instruction, sm_80 and later
_ALU = frozenset(
    """FSEL SEL LOP3 ISETP FSETP PRMT SHF SHL SHR IADD3 LEA FMNMX IMNMX VIADD F2FP SGXT PLOP3 POPC BFE I2FP VIMNMX LOP
    IABS""".split()
)
_SPECIAL = frozenset("MUFU I2F F2I F2F I2I".split())
_MEMORY = frozenset("LDS STS LDSM STSM LDG STG LDGSTS LDL STL SHFL ATOM ATOMS ATOMG RED".split())


def clocks(loop: Counter[str]) -> tuple[int, str]:
    """Lower bound on the clocks of a sub-partition for one warp and iteration, and the pipe that determines it.

    Issue takes 1 clock for each instruction, integer and select 2, MUFU and conversions 8, shared and global memory 4.
    """

    def count(names: frozenset[str]) -> int:
        return sum(n for name, n in loop.items() if name in names)

    pipes = {
        "issue": sum(loop.values()),
        "alu": 2 * count(_ALU),
        "special": 8 * count(_SPECIAL),
        "memory": 4 * count(_MEMORY),
    }
    slowest = max(pipes, key=lambda pipe: pipes[pipe])
    return pipes[slowest], slowest


def dram_margin(
    loop: Counter[str], device: Device, elements: float, bytes_per_element: float
) -> float:
    """Instruction throughput of a streaming loop divided by DRAM bandwidth. If it is below 1, instructions limit the loop.

    Args:
        loop: Instructions of one iteration.
        device: The GPU.
        elements: Elements that one thread processes in an iteration.
        bytes_per_element: Bytes of an element moved to and from DRAM.
    """
    per_clock = 128 * elements / clocks(loop)[0]
    rate = per_clock * device.sms * device.clock_ghz * 1e9 * bytes_per_element
    return rate / (device.bandwidth_gbs * 1e9)
