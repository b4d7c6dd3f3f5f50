"""Launches Triton kernels; or, for machines without a GPU, records the launches or only counts them.

Inside ``recording(target)`` nothing runs. Each launch is stored with its real arguments, which may be meta tensors. So the
machine-code tests compile exactly the kernels and configurations that the dispatcher chooses for these sizes on that GPU.
Inside ``counting(target)`` ops on any tensors take the same way as on that GPU, launch plans included, up to the last call,
which only counts. So the host's time can be measured without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core import plan, recorder
from peftkit_kernels.core.calibration import Calibration, load


@dataclass(frozen=True, slots=True)
class Target:
    """The properties of a GPU that launch configurations depend on.

    Attributes:
        arch: ``"cuda:90"`` or ``"hip:gfx942"``.
        sms: Number of streaming multiprocessors, or of compute units.
        calibration: Crossovers measured on this GPU, or the defaults.
    """

    arch: str
    sms: int
    calibration: Calibration = Calibration()  # noqa: RUF009 - frozen

    @property
    def capability(self) -> int | None:
        """Compute capability as a number (90), ``None`` on AMD."""
        kind, number = self.arch.split(":")
        return int(number) if kind == "cuda" else None


INTERPRETED = Target("cuda:80", 108)
"""In the interpreter, configurations are chosen as for an A100."""


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True


@dataclass
class _Recorder:
    target: Target
    launches: list[Launch]


@dataclass
class Counter:
    """Replaces compiled kernels inside ``counting``.

    Attributes:
        target: The GPU that configurations are chosen for.
        launches: How many kernels would have been launched.
    """

    target: Target
    launches: int = 0
    function: None = None
    packed_metadata: None = None

    def run(self, *arguments: Any) -> None:
        """Count a launch. Takes what the launcher of a compiled kernel takes."""
        self.launches += 1


_dry: ContextVar[_Recorder | Counter | None] = ContextVar("peftkit_dry_run", default=None)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches that would run on ``target``, without running them."""
    recorder = _Recorder(target, [])
    token = _dry.set(recorder)
    try:
        yield recorder.launches
    finally:
        _dry.reset(token)


@contextlib.contextmanager
def counting(target: Target) -> Iterator[Counter]:
    """Count the launches that would run on ``target``, for tensors on any device. Results are uninitialised memory.

    Launch plans keep the counter, so all plans are dropped before and after.
    """
    counter = Counter(target)
    plan.clear()
    token = _dry.set(counter)
    try:
        yield counter
    finally:
        _dry.reset(token)
        plan.clear()


def is_recording() -> bool:
    """Whether launches are being recorded."""
    return isinstance(_dry.get(), _Recorder)


def is_counting() -> bool:
    """Whether launches are being counted."""
    return isinstance(_dry.get(), Counter)


def runs_dry() -> bool:
    """Whether launches are recorded or counted instead of run. Never while torch.compile traces, which cannot read the variable."""
    return not torch.compiler.is_compiling() and _dry.get() is not None


def counted_target() -> Target | None:
    """The GPU that launches are counted for, or ``None``."""
    dry = _dry.get()
    return dry.target if isinstance(dry, Counter) else None


def on_gpu(device: torch.device) -> bool:
    """Whether ``device`` is a GPU, or is ``meta`` while launches are counted, where tensors stand for those of a GPU."""
    return device.type == "cuda" or (device.type == "meta" and is_counting())


def target_of(tensor: Tensor) -> Target:
    """The GPU that a kernel on ``tensor`` runs on."""
    dry = _dry.get()
    if dry is not None:
        return dry.target
    if tensor.device.type != "cuda":
        return INTERPRETED
    return _target_of_gpu(tensor.device.index)


@functools.cache
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    arch = f"cuda:{10 * properties.major + properties.minor}"
    if torch.version.hip:
        arch = f"hip:{properties.gcnArchName.split(':')[0]}"
    return Target(arch, properties.multi_processor_count, load(properties.name))


def aligned(*tensors: Tensor | None) -> bool:
    """Whether threads access the rows of all tensors in pieces of 128 bits instead of element by element.

    This needs rows whose start and end Triton knows to be aligned. Triton's launcher tells the compiler only about multiples
    of 16: of an address in bytes, and of a width and a stride in elements. An access element by element needs registers for
    each address, so configurations for it have smaller tiles.

    Args:
        tensors: Tensors of any strides; ``None`` entries are ignored.
    """
    for t in tensors:
        if t is None:
            continue
        if t.storage_offset() * t.element_size() % 16:
            return False
        for size, stride in zip(t.shape, t.stride(), strict=True):
            if (size if stride == 1 else stride) % 16:
                return False
    return True


def step_of(*numbers: int) -> int:
    """8 if it divides every number, else 1. Passed as STEP so that the compiler can assume this divisibility."""
    return 1 if any(number % 8 for number in numbers) else 8


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Run ``kernel`` on ``grid``, or record the launch.

    Args:
        kernel: A function decorated with ``@triton.jit``.
        grid: Number of programs along each axis.
        arguments: The kernel's arguments that are not constexpr; an absent tensor is ``None``.
        num_warps: Warps in each program.
        num_stages: Software-pipeline stages of its loops.
        fp_fusion: Whether a product and a sum may become one instruction with one rounding. Must be false for ops that
            promise the bits of their definition.
        constants: The constexpr arguments.
    """
    dry = _dry.get()
    if isinstance(dry, _Recorder):
        dry.launches.append(
            Launch(kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion)
        )
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    planner = recorder.current()
    if dry is not None:
        dry.run()
        compiled = dry
    else:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        guard = planner.pause() if planner is not None else contextlib.nullcontext()
        with guard, _current(device):
            values = [recorder.number(a) for a in arguments]
            compiled = kernel[grid](*values, **options, **constants)
    if planner is not None:
        planner.launched(kernel, compiled, grid, arguments, constants, options)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``device`` is the current GPU, if it is a GPU."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype, *factors: Tensor | None) -> str:
    """The PRECISION with which ``tiles.mixed_dot`` multiplies two float32 tiles: the precision of torch's own products.

    Products of two 16-bit elements are exact in any case.

    Args:
        dtype: The dtype of the activations.
        factors: Factors of the adapters, or their s; the dtype may differ from that of the activations.
    """
    if dtype.itemsize == 2 and any(t is not None and t.dtype is torch.float32 for t in factors):
        # with 16-bit activations, two float32 tiles are an s and a factor; their product is rounded to 16 bits, so two
        # bfloat16 parts of each, with an error of 2⁻¹⁶, are enough
        return "halves"
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
