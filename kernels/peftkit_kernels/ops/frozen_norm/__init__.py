"""RMSNorm and LayerNorm whose weight is frozen."""

from peftkit_kernels.ops.frozen_norm.op import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.ops.frozen_norm.reference import layer_norm_reference, rms_norm_reference

__all__ = ["frozen_layer_norm", "frozen_rms_norm", "layer_norm_reference", "rms_norm_reference"]
