"""Detects what else acts on torch operations: a tracer, a transformation, or a mode that watches every operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx._symbolic_trace as fx_trace
from torch.autograd import forward_ad

# bound to names once, because these functions are called many times in every forward
_is_compiling = torch.compiler.is_compiling
_has_functorch_transforms = torch._C._are_functorch_transforms_active
_is_jit_tracing = torch._C._is_tracing
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_stack_at

_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())
"""The dispatch modes of ``make_fx``, ``FakeTensorMode`` and functionalization."""


def is_transformed() -> bool:
    """Whether plain torch operations must run, because something records or transforms each of them.

    True while ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``torch.onnx.export``, ``torch.fx``, ``make_fx`` or
    ``FakeTensorMode`` records operations, in the transforms of ``torch.func``, and with forward-mode tangents. A recorded
    program must not contain values of this call, such as the seed of a dropout mask or the result of a native pass.
    ``torch.func`` and tangents have no rule for the autograd functions here.
    """
    return (
        _is_compiling()
        or _has_functorch_transforms()
        or forward_ad._current_level >= 0
        or _is_jit_tracing()
        or fx_trace._is_fx_tracing_flag
        or (
            _count_dispatch_modes() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)
        )
    )


def innermost_mode() -> Any:
    """The dispatch mode that is called first, or ``None``, also while ``torch.compile`` traces."""
    if _is_compiling():
        return None
    count = _count_dispatch_modes()
    return _dispatch_mode(count - 1) if count else None


def hides_native_calls() -> bool:
    """Whether something records or watches torch operations and would miss a call of native code.

    True in every ``TorchDispatchMode``, such as ``FlopCounterMode``, and whenever ``is_transformed`` is true. A mode that only
    watches, and must not change which calls run, has the attribute ``sees_native_calls = True``.
    """
    if is_transformed():  # first, because torch.compile cannot trace the rest
        return True
    modes = map(_dispatch_mode, range(_count_dispatch_modes()))
    return any(not getattr(mode, "sees_native_calls", False) for mode in modes)
