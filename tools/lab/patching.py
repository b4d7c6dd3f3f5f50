"""Triton's interpreter, and a clear error if the lab cannot patch it.

Counting bytes and repairing values both replace private methods of the interpreter. The lab first checks the names and
parameters of these methods. If a version of Triton has changed them, an error names it; the counts would be wrong.
"""

from __future__ import annotations

import inspect

import triton
from triton import knobs
from triton.runtime import interpreter

TESTED_TRITON = "3.7.1", "3.9.0"
"""torch 2.13 for CUDA depends on the first."""

Builder = interpreter.InterpreterBuilder
Executor = interpreter.GridExecutor
Handle = interpreter.TensorHandle

_PARAMETERS = {
    "cast_impl": "src dst_type",
    "create_fp_to_fp": "src dst_type rounding_mode",
    "binary_op": "lhs rhs op",
    "unary_op": "arg op",
    "create_fma": "x y z",
    "create_clampf": "arg lo hi propagate_nans",
    "create_dot": "a b d input_precision max_num_imprecise_acc",
    "set_grid_idx": "x y z",
    "set_grid_dim": "nx ny nz",
    "create_masked_load": (
        "ptrs mask other cache_modifier eviction_policy is_volatile",
        "ptrs mask other cache_policy is_volatile",
    ),
    "create_masked_store": (
        "ptrs value mask cache_modifier eviction_policy",
        "ptrs value mask cache_policy",
    ),
    "create_atomic_rmw": "rmwOp ptr val mask sem scope",
    "create_atomic_cas": "ptr cmp val sem scope",
}


def check_interpreter() -> None:
    """Raise unless kernels run in the interpreter and it has the methods that the lab patches.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is not set, or this Triton's interpreter has other private methods.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError(
            "the lab runs kernels in Triton's interpreter, which is off; set TRITON_INTERPRET=1 before triton is imported"
        )
    check_methods(Builder)


def check_methods(builder: type) -> None:
    """Raise ``RuntimeError`` unless ``builder`` has every method that the lab patches, with the same parameters."""
    for name, expected in _PARAMETERS.items():
        method = getattr(builder, name, None)
        parameters = "" if method is None else " ".join(inspect.signature(method).parameters)
        known = (expected,) if isinstance(expected, str) else expected
        if parameters not in [f"self {names}" for names in known]:
            found = f"{name}({parameters})" if method else f"no {name}"
            raise RuntimeError(
                f"the interpreter of Triton {triton.__version__} has {found}, but the lab patches "
                f"{name}(self {' or '.join(known)}); install triton {' or '.join(TESTED_TRITON)}, "
                "with which it is tested"
            )
