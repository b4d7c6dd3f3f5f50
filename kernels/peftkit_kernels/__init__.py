"""Fused operations for parameter-efficient fine-tuning: torch and Triton only, no transformers, no PEFT.

Each public name is imported at its first use, so that ``import peftkit_kernels`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.attention import attention
    from peftkit_kernels.ops.bottleneck import bottleneck
    from peftkit_kernels.ops.dora import dora_linear, dora_norm
    from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_scale
    from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm
    from peftkit_kernels.ops.grouped_lora import GroupPlan, grouped_lora, plan_groups
    from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
    from peftkit_kernels.ops.linear_cross_entropy import linear_cross_entropy
    from peftkit_kernels.ops.lora_decoder_layer import Norm, lora_decoder_layer
    from peftkit_kernels.ops.lora_linear import lora_linear
    from peftkit_kernels.ops.lora_qkv import lora_qkv
    from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
    from peftkit_kernels.ops.prefix_attention import prefix_attention
    from peftkit_kernels.ops.quantized_linear import fp8_linear, int8_linear, nf4_linear
    from peftkit_kernels.storage.fp8 import Float8Weight, dequantize_fp8, quantize_fp8
    from peftkit_kernels.storage.int8 import (
        Int8ComputeWeight,
        Int8Weight,
        dequantize_int8,
        quantize_int8,
    )
    from peftkit_kernels.storage.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
    from peftkit_kernels.storage.requantized import RequantizedWeight, requantize

__all__ = [
    "Float8Weight",
    "GroupPlan",
    "Int8ComputeWeight",
    "Int8Weight",
    "LoRA",
    "NF4Weight",
    "Norm",
    "RequantizedWeight",
    "Scale",
    "attention",
    "bottleneck",
    "dequantize_fp8",
    "dequantize_int8",
    "dequantize_nf4",
    "dora_gate",
    "dora_linear",
    "dora_norm",
    "dora_scale",
    "fp8_linear",
    "frozen_layer_norm",
    "frozen_rms_norm",
    "grouped_lora",
    "int8_compute_linear",
    "int8_linear",
    "linear_cross_entropy",
    "lora_decoder_layer",
    "lora_linear",
    "lora_qkv",
    "lora_swiglu_mlp",
    "nf4_linear",
    "plan_groups",
    "prefix_attention",
    "quantize_fp8",
    "quantize_int8",
    "quantize_nf4",
    "requantize",
]

_HOME_OF = {
    "Float8Weight": "storage.fp8",
    "GroupPlan": "ops.grouped_lora",
    "Int8ComputeWeight": "storage.int8",
    "Int8Weight": "storage.int8",
    "LoRA": "low_rank",
    "NF4Weight": "storage.nf4",
    "Norm": "ops.lora_decoder_layer",
    "RequantizedWeight": "storage.requantized",
    "Scale": "ops.dora_scale",
    "attention": "ops.attention",
    "bottleneck": "ops.bottleneck",
    "dequantize_fp8": "storage.fp8",
    "dequantize_int8": "storage.int8",
    "dequantize_nf4": "storage.nf4",
    "dora_gate": "ops.dora_scale",
    "dora_linear": "ops.dora",
    "dora_norm": "ops.dora",
    "dora_scale": "ops.dora_scale",
    "fp8_linear": "ops.quantized_linear",
    "frozen_layer_norm": "ops.frozen_norm",
    "frozen_rms_norm": "ops.frozen_norm",
    "grouped_lora": "ops.grouped_lora",
    "int8_compute_linear": "ops.int8_compute_linear",
    "int8_linear": "ops.quantized_linear",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "lora_decoder_layer": "ops.lora_decoder_layer",
    "lora_linear": "ops.lora_linear",
    "lora_qkv": "ops.lora_qkv",
    "lora_swiglu_mlp": "ops.lora_swiglu_mlp",
    "nf4_linear": "ops.quantized_linear",
    "plan_groups": "ops.grouped_lora",
    "prefix_attention": "ops.prefix_attention",
    "quantize_fp8": "storage.fp8",
    "quantize_int8": "storage.int8",
    "quantize_nf4": "storage.nf4",
    "requantize": "storage.requantized",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
