"""A whole decoder layer with frozen weights and low-rank updates: one op, forward and backward."""

from peftkit_kernels.ops.lora_decoder_layer.op import Remake, lora_decoder_layer, obstacle
from peftkit_kernels.ops.lora_decoder_layer.reference import Norm, lora_decoder_layer_reference

__all__ = ["Norm", "Remake", "lora_decoder_layer", "lora_decoder_layer_reference", "obstacle"]
