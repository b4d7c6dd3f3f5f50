"""The magnitude of DoRA applied to the output of a LoRA linear, or to the two outputs and the activation of a gated MLP."""

from peftkit_kernels.ops.dora_scale.op import dora_gate, dora_scale
from peftkit_kernels.ops.dora_scale.reference import (
    Scale,
    dora_gate_reference,
    dora_scale_reference,
)

__all__ = ["Scale", "dora_gate", "dora_gate_reference", "dora_scale", "dora_scale_reference"]
