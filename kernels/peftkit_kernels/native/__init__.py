"""Element-wise operations and attention for the CPU in C, built once with the machine's own compiler.

torch needs one pass over memory, and one new buffer, for every elementary operation. Each function here reads its inputs
once and writes its outputs once. They run on contiguous float32 tensors on the CPU. For other tensors, and on a machine
without a C compiler, torch operations run instead.

Native code is called past torch: no mode, tracer or transformation sees the call (``peftkit_kernels.core.modes``). A caller
checks ``supports`` first. Every size goes to C as a Python int or raises ``ctypes.ArgumentError``, and every tensor must have
memory.
"""

from peftkit_kernels.native.attention_calls import attention, attention_backward
from peftkit_kernels.native.elementwise import (
    GATES,
    MAX_RANK,
    cross_entropy_,
    dequantize_nf4,
    dropout,
    gate_backward,
    gated,
    has_int8_products,
    int8_epilogue,
    int8_linear,
    layer_norm,
    layer_norm_backward,
    quantize_rows,
    register_bytes,
    rms_norm,
    rms_norm_backward,
    scale_backward,
    scaled_gate,
    scaled_gate_backward,
    updated_norm,
)
from peftkit_kernels.native.library import SYMBOLS, description, obstacle, skipped, supports
from peftkit_kernels.native.merge_calls import merge, round_nf4

__all__ = [
    "GATES",
    "MAX_RANK",
    "SYMBOLS",
    "attention",
    "attention_backward",
    "cross_entropy_",
    "dequantize_nf4",
    "description",
    "dropout",
    "gate_backward",
    "gated",
    "has_int8_products",
    "int8_epilogue",
    "int8_linear",
    "layer_norm",
    "layer_norm_backward",
    "merge",
    "obstacle",
    "quantize_rows",
    "register_bytes",
    "rms_norm",
    "rms_norm_backward",
    "round_nf4",
    "scale_backward",
    "scaled_gate",
    "scaled_gate_backward",
    "skipped",
    "supports",
    "updated_norm",
]
