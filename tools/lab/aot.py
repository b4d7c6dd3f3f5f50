"""Compile recorded launches for GPUs that need not be present, and read the machine code.

    with recording(Target("cuda:90", 132)) as launches:
        lora_linear(...)                                # on meta tensors
    for report in inspect_launches(launches, "cuda:90"):
        assert not report.problems()

It must run in a process without ``TRITON_INTERPRET``, because ``@triton.jit`` of the interpreter returns a function that the
compiler cannot lower. Pointers and integers get the hints that the JIT derives at run time (16-byte alignment, multiples of 16,
equal to 1). Without them Triton emits two-byte loads, and registers and spills are not those of the real kernel.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lab import inventory
from lab.machine_code import Report, read_amd, read_nvidia
from peftkit_kernels.core.launch import Launch, aligned
from peftkit_kernels.low_rank.config import RANK_TILE

ARCHS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
QUICK_ARCHS = ("cuda:80", "cuda:90")

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_STREAMED = 64
"""A tensor counts as streamed if it has at least 1 / 64 of the bytes of the largest tensor and its rows are longer than a rank."""


def rows(
    ops: Iterable[str] | None = None, archs: Iterable[str] | None = None, *, every: bool = False
) -> list[dict[str, Any]]:
    """``Report.row`` of every kernel that the dispatcher can choose.

    Args:
        ops: Keys of ``inventory.OPS``; ``None`` means all.
        archs: Some of ``ARCHS``; ``None`` means ``QUICK_ARCHS``, or all with ``every``.
        every: Whether to compile all ranks, dtypes and sizes, and not only ranks 16 and 64 in bfloat16 at even sizes.
    """
    options: dict[str, Any] = {}
    if every:
        options = {
            "ranks": inventory.RANKS,
            "dtypes": inventory.DTYPES,
            "sizes": inventory.SIZES,
        }
    found = []
    for arch in inventory.known_archs(archs or (ARCHS if every else QUICK_ARCHS)):
        for op in ops or inventory.OPS:
            reports = inspect_launches(inventory.launches(op, arch, **options), arch)
            found += [{"op": op} | report.row() for report in reports]
    return found


def inspect_launches(launches: Iterable[Launch], arch: str) -> list[Report]:
    """Compile every distinct kernel of ``launches`` for ``arch`` and read its machine code.

    A target that rejects a kernel is a result (``Report.error``), not an exception.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so Triton cannot compile kernels; run this in a process without it"
        )
    sources = {}
    for launch in launches:
        signature, constants, hints = _specialise(launch)
        key = (
            launch.kernel.fn,
            str(signature),
            str(constants),
            launch.num_warps,
            launch.num_stages,
            launch.fp_fusion,
            str(hints),
        )
        sources[key] = (launch, signature, constants, hints)
    return [_inspect(*parts, arch) for parts in sources.values()]


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """The JIT's view of the arguments: types by name, constants by name, and hints by position."""
    signature, constants, hints = {}, dict(launch.constants), {}
    values = iter(launch.arguments)
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = next(values)
        fixed = parameter.do_not_specialize
        if value is None or (type(value) is int and value == 1 and not fixed):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        aligned = _alignment_of(value)
        if aligned is not None and aligned % 16 == 0 and not fixed:
            hints[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, hints


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _alignment_of(value: Any) -> int | None:
    """The number that must be a multiple of 16 for the JIT's hint: the address of a tensor in bytes, or an integer itself."""
    if isinstance(value, Tensor):
        return int(value.storage_offset()) * value.element_size()
    return value if isinstance(value, int) else None


def _inspect(launch: Launch, signature: dict, constants: dict, hints: dict, arch: str) -> Report:
    words = [f"{name}={value}" for name, value in launch.constants.items()]
    config = " ".join([*words, f"warps={launch.num_warps}", f"stages={launch.num_stages}"])
    pointers = ",".join(sorted({kind for kind in signature.values() if kind.startswith("*")}))
    report = Report(launch.kernel.__name__, f"{pointers} {config}", arch)
    report.constants = launch.constants
    tensors = [a for a in launch.arguments if isinstance(a, Tensor)]
    report.itemsize = tensors[0].element_size()
    report.aligned = aligned(*_streamed(tensors))
    source = ASTSource(launch.kernel, signature, constants, hints)
    kind, number = arch.split(":")
    target = GPUTarget("cuda", int(number), 32) if kind == "cuda" else GPUTarget(kind, number, 64)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fp_fusion,
    }
    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # if ptxas fails, Triton prints the whole program
            compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report.error = f"{type(error).__name__}: {lines[0][:80]} … {lines[-1][:160]}"
        return report
    report.warps = compiled.metadata.num_warps
    report.shared_bytes = compiled.metadata.shared
    report.dots = len(_tensor_core_dots(compiled.asm["ttir"]))
    report.has_loop = "scf.for" in compiled.asm["ttir"]
    if kind == "cuda":
        read_nvidia(report, compiled.asm["cubin"])
    else:
        read_amd(report, compiled.asm["amdgcn"])
    return report


def _streamed(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors whose rows must be aligned: large ones with rows longer than a rank, or else the largest one."""
    largest = max(tensors, key=lambda t: t.nbytes)
    wide = [t for t in tensors if t.dim() and t.shape[-1] > RANK_TILE]
    return [t for t in wide if _STREAMED * t.nbytes >= largest.nbytes] or [largest]


def _tensor_core_dots(ttir: str) -> list[str]:
    """The dots of a kernel, except exact float32 dots, for which there is no tensor-core instruction."""
    dots = re.findall(r"\btt\.dot\b.*", ttir)
    return [dot for dot in dots if "tf32" in dot or not re.search(r": tensor<[0-9x]+xf32", dot)]
