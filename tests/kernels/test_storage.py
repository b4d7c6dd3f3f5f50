"""Kinds of storage: each weight is decoded by its own kind, and a weight of no known kind is refused."""

import pytest
import torch

from peftkit.fuse.compute import LinearParts, linear
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import (
    KINDS,
    decode,
    decode_triton,
    dequantize_reference,
    kind_of,
    layout_of,
    rebuild,
)

QUANTIZE = {
    "nf4": quantize_nf4,
    "nf4, nested": lambda weight: quantize_nf4(weight, nested=True),
    "int8": quantize_int8,
}


class _Unknown:
    """A weight of another library."""

    shape, device = (6, 8), torch.device("cpu")

    def tensors(self):
        return [torch.zeros(6, 8, dtype=torch.int8)]


@pytest.mark.parametrize("name", QUANTIZE)
def test_a_weight_is_rebuilt_from_what_an_op_takes(name):
    q = QUANTIZE[name](torch.randn(6, 64))
    assert kind_of(q).name == name.split(",")[0]
    layout = layout_of(q)
    assert layout[-2:] == [6, 64]
    again = rebuild(q.tensors(), layout)
    assert type(again) is type(q)
    expected = dequantize_reference(q, torch.float32)
    assert torch.equal(dequantize_reference(again, torch.float32), expected)
    assert torch.equal(decode(again, torch.float32), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda q: decode(q, torch.float32),
        lambda q: decode_triton(q, torch.float32),
        lambda q: dequantize_reference(q, torch.float32),
        layout_of,
    ],
)
def test_a_weight_of_no_known_kind_is_never_decoded_as_another(use):
    with pytest.raises(TypeError, match=r"q is a _Unknown; .* are NF4Weight, Int8Weight"):
        use(_Unknown())


@pytest.mark.parametrize("name", QUANTIZE)
def test_every_kind_has_a_linear_and_an_unknown_one_has_none(name):
    x, q = torch.randn(3, 64), QUANTIZE[name](torch.randn(6, 64))
    y = linear(x, LinearParts(q, None, None))
    torch.testing.assert_close(y, x @ dequantize_reference(q, torch.float32).t())
    assert type(q) in {kind.weight for kind in KINDS}
    with pytest.raises(TypeError, match="no linear on a _Unknown"):
        linear(x, LinearParts(_Unknown(), None, None))
