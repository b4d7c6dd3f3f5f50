"""Chooses the implementation of an op, and says in a sentence why another one cannot run.

``reference`` is the definition in plain torch, differentiated by autograd. ``torch`` is the fast schedule written with torch
ops (CPU, and GPU without Triton). ``triton`` is the GPU kernel; if it is requested by name there is no fallback.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from peftkit_kernels.core.launch import counted_target, runs_dry
from peftkit_kernels.core.modes import is_transformed
from peftkit_kernels.low_rank.config import MAX_RANK, RANK_TILE

__all__ = ["Backend", "choose_backend", "is_transformed", "triton_obstacle"]

Backend = Literal["auto", "reference", "torch", "triton"]

_WITHOUT_TILES = frozenset(("grouped_lora", "linear_cross_entropy"))
"""Ops whose kernels hold all ranks in registers."""

_BACKENDS = get_args(Backend)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_obstacle(
    op: str,
    *tensors: Tensor | None,
    rank: int = 0,
    has_dot: bool = True,
    own_obstacle: str | None = None,
) -> str | None:
    """Why ``op`` cannot run on Triton with these tensors, as a sentence, or ``None`` if it can.

    Args:
        op: Name of the op.
        tensors: The op's arguments, its input first; none if the op has no Triton kernel.
        rank: The largest rank of its adapters.
        has_dot: Whether its kernels multiply matrices.
        own_obstacle: A reason that only the op can know, as a sentence, or ``None``.
    """
    present = [t for t in tensors if t is not None]
    if not present:
        return f"{op} has no Triton kernel in this release"
    x = present[0]
    for t in present:
        if t.device != x.device:
            return (
                f"its tensors are on {x.device} and {t.device}; a kernel needs them on one device"
            )
    if x.dtype not in _DTYPES:
        return f"its input is {x.dtype}; the kernels compute in bfloat16, float16 and float32"
    if any(t.dtype is torch.float64 for t in present):
        return "one of its tensors is torch.float64; the kernels compute in at most float32"
    most = RANK_TILE if op in _WITHOUT_TILES else MAX_RANK
    if rank > most:
        return f"the rank is {rank}; its kernels compute up to {most}"
    if own_obstacle is not None:
        return own_obstacle
    if runs_dry():
        target = counted_target()
        capability = None if target is None else target.capability
        return None if capability is None else _capability_obstacle(capability, x.dtype, has_dot)
    of_device = _device_obstacle if torch.compiler.is_compiling() else _cached_device_obstacle
    return of_device(x.device.type, x.device.index, x.dtype, has_dot)


def _device_obstacle(kind: str, index: int | None, dtype: torch.dtype, has_dot: bool) -> str | None:
    """The part of ``triton_obstacle`` that does not change while a process runs."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind != "cuda":
        from triton import knobs

        if kind == "cpu" and knobs.runtime.interpret:
            return None
        return (
            f"its tensors are on {kind}, where Triton runs only in its interpreter "
            "(TRITON_INTERPRET=1, set before triton is imported)"
        )
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return _capability_obstacle(10 * major + minor, dtype, has_dot)


def _capability_obstacle(capability: int, dtype: torch.dtype, has_dot: bool) -> str | None:
    """Why kernels cannot run on an NVIDIA GPU of this compute capability, as ``triton_obstacle``."""
    if capability < 80:
        if dtype is torch.bfloat16:
            return f"this GPU (sm_{capability}) has no bfloat16 arithmetic"
        if has_dot:
            return (
                f"Triton has no tensor-core products on this GPU (sm_{capability}); it needs sm_80"
            )
    return None


# torch.compile treats the result as a constant. torch.compiler.assume_constant_result sets the same attribute, but imports
# the compiler. The cache is only for eager calls, in which one check takes 20 microseconds; torch.compile would trace through it.
_device_obstacle._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_cached_device_obstacle = functools.cache(_device_obstacle)


def choose_backend(
    op: str,
    backend: Backend,
    *tensors: Tensor | None,
    rank: int = 0,
    has_dot: bool = True,
    own_obstacle: str | None = None,
) -> Literal["reference", "torch", "triton"]:
    """Resolve the backend of one call; the other arguments are those of ``triton_obstacle``.

    The automatic choice is ``triton`` on a GPU if it has no obstacle, and ``torch`` otherwise. Inside a transformation
    (``is_transformed``) it is ``reference``, except under ``torch.compile`` on a GPU: it remains ``triton``, because
    torch.compile treats a Triton op as one opaque operation.

    Raises:
        ValueError: ``backend`` is unknown, or is ``"triton"`` and Triton cannot run.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(_BACKENDS)}")
    if backend == "triton":
        obstacle = triton_obstacle(
            op, *tensors, rank=rank, has_dot=has_dot, own_obstacle=own_obstacle
        )
        if obstacle is not None:
            raise ValueError(
                f"backend='triton': {op} cannot run on it: {obstacle}; use backend='auto'"
            )
        return "triton"
    if backend != "auto":
        return backend
    transformed = is_transformed()
    x = tensors[0] if tensors else None
    on_gpu = x is not None and (x.is_cuda or runs_dry())
    if on_gpu and (not transformed or torch.compiler.is_compiling()):
        obstacle = triton_obstacle(
            op, *tensors, rank=rank, has_dot=has_dot, own_obstacle=own_obstacle
        )
        if obstacle is None:
            return "triton"
    return "reference" if transformed else "torch"
