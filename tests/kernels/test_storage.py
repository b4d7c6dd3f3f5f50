"""Kinds of storage: each weight is decoded by its own kind, and a weight of no known kind is refused."""

import pytest
import torch

from peftkit.fuse.compute import LinearParts, linear
from peftkit_kernels.core.structure import build, flatten
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.storage.fp8 import quantize_fp8
from peftkit_kernels.storage.int8 import Int8ComputeWeight, quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import (
    KINDS,
    decode,
    decode_triton,
    dense_reference,
    dequantize_reference,
    kind_of,
)

QUANTIZE = {
    "nf4": quantize_nf4,
    "nf4, nested": lambda weight: quantize_nf4(weight, nested=True),
    "int8": quantize_int8,
    "int8 compute": lambda weight: _in_8_bits(weight, None),
    "int8 compute, outliers": lambda weight: _in_8_bits(weight, 2.5),
    "fp8": quantize_fp8,
}


def _in_8_bits(weight, threshold):
    return Int8ComputeWeight(*quantize_int8(weight).tensors(), threshold)


class _Unknown:
    """A weight of another library."""

    shape, device = (6, 8), torch.device("cpu")

    def tensors(self):
        return [torch.zeros(6, 8, dtype=torch.int8)]


@pytest.mark.parametrize("name", QUANTIZE)
def test_a_weight_is_rebuilt_from_what_an_op_takes(name):
    q = QUANTIZE[name](torch.randn(6, 64))
    assert kind_of(q).name == name.split(",")[0]
    tensors, _, structure = flatten([q, torch.ones(1)])
    again, other = build(structure, tensors)
    assert type(again) is type(q)
    assert torch.equal(other, torch.ones(1))
    expected = dequantize_reference(q, torch.float32)
    assert torch.equal(dequantize_reference(again, torch.float32), expected)
    assert torch.equal(decode(again, torch.float32), expected)


@pytest.mark.parametrize(
    "names", [["nf4"] * 3, ["int8"] * 3, ["nf4, nested", None, "int8"]], ids=str
)
@pytest.mark.parametrize("op", ["lora_qkv", "lora_swiglu_mlp"])
def test_an_op_on_quantised_weights_gives_the_bits_of_their_decoded_values(op, names):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shapes = [(48, 64), (48, 64), (64, 48)] if op == "lora_swiglu_mlp" else [(48, 64)] * 3
    weights = [draw(*shape) for shape in shapes]
    weights = [w if n is None else QUANTIZE[n](w) for n, w in zip(names, weights, strict=True)]
    loras = [
        LoRA(draw(4, K).requires_grad_(), draw(N, 4).requires_grad_(), 0.5, 0.2, 3)
        for N, K in shapes
    ]
    x = draw(2, 7, 64).requires_grad_()
    function = {"lora_qkv": lora_qkv, "lora_swiglu_mlp": lora_swiglu_mlp}[op]

    def run(weights, backend):
        outputs = function(x, weights, [None] * 3, loras, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [x, *(t for lora in loras for t in (lora.A, lora.B))]
        loss = sum(y.square().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    decoded = [dense_reference(w, torch.float32) for w in weights]
    for backend in ("torch", "reference"):
        for ours, theirs in zip(run(weights, backend), run(decoded, backend), strict=True):
            assert torch.equal(ours, theirs), backend


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("threshold", [None, 2.5])
@pytest.mark.parametrize("op", ["lora_qkv", "lora_swiglu_mlp"])
def test_products_in_8_bits_and_gradients_of_the_decoded_weight(op, threshold, backend):
    """Forward as ``int8_compute_linear``; backward as with the decoded weight, from what the forward has kept."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stored = [quantize_int8(draw(48, 64)), quantize_int8(draw(48, 64)), quantize_int8(draw(64, 48))]
    weights = [Int8ComputeWeight(*q.tensors(), threshold) for q in stored]
    x = draw(2, 7, 64).requires_grad_()
    alone = [int8_compute_linear(x, q, threshold=threshold) for q in stored[:2]]
    if op == "lora_qkv":
        found = lora_qkv(x, weights[:2], [None] * 2, [None] * 2, backend=backend)
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs)
        (dx,) = torch.autograd.grad(sum(y.sum() for y in found), x)
        ones = torch.ones(2, 7, 48)
        expected = sum(ones @ dequantize_reference(q, torch.float32) for q in stored[:2])
        torch.testing.assert_close(dx, expected)
        return
    y = lora_swiglu_mlp(x, weights, [None] * 3, [None] * 3, backend=backend)
    h = torch.nn.functional.silu(alone[0]) * alone[1]
    expected = int8_compute_linear(h, stored[2], threshold=threshold)
    # a code may differ where h differs in its last bits
    step = h.abs().amax() / 127 * dequantize_reference(stored[2], torch.float32).abs().amax()
    assert (y - expected).abs().max() <= 2 * step
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
    assert dx.abs().max() > 0


@pytest.mark.parametrize(
    ("threshold", "width", "message"),
    [
        (-1.0, 8, "threshold=-1.0 makes every column an outlier"),
        (None, 133_145, "overflow 32 bits"),
    ],
)
def test_weights_that_cannot_be_multiplied_in_8_bits(threshold, width, message):
    codes = torch.zeros(2, width, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        Int8ComputeWeight(codes, torch.ones(2), threshold)


@pytest.mark.parametrize(
    "use",
    [
        lambda q: decode(q, torch.float32),
        lambda q: decode_triton(q, torch.float32),
        lambda q: dequantize_reference(q, torch.float32),
        kind_of,
    ],
)
def test_a_weight_of_no_known_kind_is_never_decoded_as_another(use):
    with pytest.raises(TypeError, match=r"q is a _Unknown; .* are NF4Weight, Int8Weight, Int8"):
        use(_Unknown())


def test_an_op_takes_no_weight_of_an_unknown_kind():
    with pytest.raises(TypeError, match="an operation takes no _Unknown"):
        lora_qkv(torch.zeros(2, 8), [_Unknown()], [None], [None])


@pytest.mark.parametrize("name", QUANTIZE)
def test_every_kind_has_a_linear_and_an_unknown_one_has_none(name):
    x, q = torch.randn(3, 64), QUANTIZE[name](torch.randn(6, 64))
    y = linear(x, LinearParts(q, None, None))
    # rounding a row to the codes of a product costs more in float8
    loose = {"int8 compute": 0.3, "fp8": 2.0}.get(name.split(",")[0])
    loose = {} if loose is None else {"rtol": 0.0, "atol": loose}
    torch.testing.assert_close(y, x @ dequantize_reference(q, torch.float32).t(), **loose)
    assert type(q) in {kind.weight for kind in KINDS}
    with pytest.raises(TypeError, match="no linear on a _Unknown"):
        linear(x, LinearParts(_Unknown(), None, None))
