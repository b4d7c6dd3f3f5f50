"""Float8 with one scale for each output row, as a kind of storage."""

from peftkit_kernels.storage.fp8.op import dequantize_fp8
from peftkit_kernels.storage.fp8.reference import dequantize_fp8_reference
from peftkit_kernels.storage.fp8.triton_impl import dequantize_into
from peftkit_kernels.storage.fp8.weight import Float8Weight
from peftkit_kernels.storage.kind import Kind

FP8 = Kind(
    name="fp8",
    weight=Float8Weight,
    reference=dequantize_fp8_reference,
    decode=lambda q, out, row_scale: dequantize_fp8(
        q, out=out, row_scale=row_scale, backend="torch"
    ),
    decode_triton=dequantize_into,
    layout=lambda q: list(q.shape),
    rebuild=lambda tensors, layout: Float8Weight(*tensors),
)
