"""Four-bit NormalFloat as a kind of storage."""

from peftkit_kernels.storage.kind import Kind
from peftkit_kernels.storage.nf4.op import dequantize_nf4
from peftkit_kernels.storage.nf4.reference import dequantize_nf4_reference
from peftkit_kernels.storage.nf4.triton_impl import dequantize_into
from peftkit_kernels.storage.nf4.weight import NF4Weight

NF4 = Kind(
    name="nf4",
    weight=NF4Weight,
    reference=dequantize_nf4_reference,
    decode=lambda q, out, row_scale: dequantize_nf4(
        q, out=out, row_scale=row_scale, backend="torch"
    ),
    decode_triton=dequantize_into,
    layout=NF4Weight.layout,
    rebuild=NF4Weight.rebuild,
)
