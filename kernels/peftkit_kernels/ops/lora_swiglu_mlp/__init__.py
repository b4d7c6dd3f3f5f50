"""The gated MLP of a transformer block with low-rank updates on its three linears."""

from peftkit_kernels.ops.lora_swiglu_mlp.activation import ACTIVATIONS
from peftkit_kernels.ops.lora_swiglu_mlp.op import lora_swiglu_mlp
from peftkit_kernels.ops.lora_swiglu_mlp.reference import lora_swiglu_mlp_reference

__all__ = ["ACTIVATIONS", "lora_swiglu_mlp", "lora_swiglu_mlp_reference"]
