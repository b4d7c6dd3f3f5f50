"""The magnitude of DoRA applied to what a LoRA linear gives: one output, or the two of a gated MLP with its activation."""

from peftkit_kernels.dora_scale.op import dora_gate, dora_scale
from peftkit_kernels.dora_scale.reference import Scale, dora_gate_reference, dora_scale_reference

__all__ = ["Scale", "dora_gate", "dora_gate_reference", "dora_scale", "dora_scale_reference"]
