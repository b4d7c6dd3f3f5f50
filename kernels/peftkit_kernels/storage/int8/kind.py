"""Eight bits with one scale for each output row, as two kinds of storage: decoded before a product, or multiplied in 8 bits."""

from peftkit_kernels.storage.int8.op import dequantize_int8
from peftkit_kernels.storage.int8.reference import dequantize_int8_reference
from peftkit_kernels.storage.int8.triton_impl import dequantize_into
from peftkit_kernels.storage.int8.weight import Int8ComputeWeight, Int8Weight
from peftkit_kernels.storage.kind import Kind

INT8 = Kind(
    name="int8",
    weight=Int8Weight,
    reference=dequantize_int8_reference,
    decode=lambda q, out, row_scale: dequantize_int8(
        q, out=out, row_scale=row_scale, backend="torch"
    ),
    decode_triton=dequantize_into,
    layout=lambda q: list(q.shape),
    rebuild=lambda tensors, layout: Int8Weight(*tensors),
)
INT8_COMPUTE = INT8._replace(
    name="int8 compute",
    weight=Int8ComputeWeight,
    layout=Int8ComputeWeight.layout,
    rebuild=Int8ComputeWeight.rebuild,
)
