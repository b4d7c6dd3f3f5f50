"""The steps of the frozen norms by one Triton kernel each way."""

from __future__ import annotations

from peftkit_kernels.ops.frozen_norm import passes


class TritonPasses:
    """The steps of ``ops.frozen_norm.schedule``."""

    rms_norm = staticmethod(passes.rms_forward)
    layer_norm = staticmethod(passes.layer_forward)
    grad_x = staticmethod(passes.backward)
