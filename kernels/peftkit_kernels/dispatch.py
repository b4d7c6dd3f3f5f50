"""Which implementation of an op runs, and the sentence saying why another one cannot.

``reference`` is the definition in plain torch, differentiated by autograd. ``torch`` is the fast schedule written with torch
ops (CPU, and GPU without Triton). ``triton`` is the GPU kernel; asking for it by name never falls back.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "torch", "triton"]

_BACKENDS = get_args(Backend)


def triton_obstacle(op: str) -> str | None:
    """Why ``op`` cannot run on Triton here, as a sentence, or ``None`` when it can."""
    return f"{op} has no Triton kernel in this release"


def choose_backend(op: str, backend: Backend) -> Literal["reference", "torch"]:
    """Resolve the backend of one call.

    Under ``torch.compile`` the automatic choice is ``reference``: the compiler fuses and differentiates plain torch ops
    itself, and an opaque autograd function would only stand in its way.

    Raises:
        ValueError: ``backend`` is unknown, or is ``"triton"`` where that cannot run.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(_BACKENDS)}")
    if backend == "triton":
        raise ValueError(f"backend='triton': {triton_obstacle(op)}; use backend='auto'")
    if backend == "auto":
        return "reference" if torch.compiler.is_compiling() else "torch"
    return backend
