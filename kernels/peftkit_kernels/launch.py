"""Launching Triton kernels, and recording launches instead: the same code gives the machine-code tests their inputs.

Inside ``recording(target)`` nothing runs. What would have been launched is kept with its real arguments (meta tensors will
do), so that the compiler can be asked about exactly what the dispatcher chooses for these sizes on that GPU.
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

from peftkit_kernels.calibration import Calibration, load


@dataclass(frozen=True, slots=True)
class Target:
    """What the configurations depend on.

    Attributes:
        arch: ``"cuda:90"`` or ``"hip:gfx942"``.
        sms: Streaming multiprocessors, or compute units.
        calibration: Crossovers measured there, or the defaults.
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
"""What the interpreter stands for: an A100."""


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


_recorder: ContextVar[_Recorder | None] = ContextVar("peftkit_recorder", default=None)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect launches as they would happen on ``target`` instead of running them."""
    recorder = _Recorder(target, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Whether launches are being recorded."""
    return _recorder.get() is not None


def target_of(tensor: Tensor) -> Target:
    """The GPU a kernel on ``tensor`` runs on."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.target
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
    """Whether threads access the rows of all tensors in pieces of 128 bits rather than by elements.

    They do where Triton knows where a row starts and ends: it is told of multiples of 16, of an address in bytes, and of a
    width and a distance in elements. An element's address takes registers, so that a tile read by elements is smaller.

    Args:
        tensors: Of any strides; those that are ``None`` do not matter.
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
    """8 where it divides all ``numbers``, otherwise 1: the STEP with which a kernel says that of them to the compiler."""
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
    """Run ``kernel`` on ``grid``, or record that.

    Args:
        kernel: From ``@triton.jit``.
        grid: Programs along each axis.
        arguments: The kernel's arguments that are not constexpr; an absent tensor is ``None``.
        num_warps: Warps a program.
        num_stages: Software-pipeline stages of its loops.
        fp_fusion: Whether a product and a sum may become one instruction with one rounding; not where bits are promised.
        constants: The constexpr arguments.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(
            Launch(kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion)
        )
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    guard = contextlib.nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        kernel[grid](
            *arguments,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=fp_fusion,
            **constants,
        )


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype, *factors: Tensor | None) -> str:
    """How ``tiles.mixed_dot`` multiplies two float32 tiles: as torch's own products do. 16-bit ones are exact in any case.

    Args:
        dtype: Of the activations.
        factors: Those of the adapters, whose dtype may differ, or each s. Beside 16-bit activations two float32 tiles are an s and a factor, whose
            product is rounded to 16 bits: bfloat16 halves, with an error of 2⁻¹⁶, are enough.
    """
    if dtype.itemsize == 2 and any(t is not None and t.dtype is torch.float32 for t in factors):
        return "halves"
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
