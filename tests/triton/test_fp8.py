"""Float8 storage and its passes by Triton: the bits of the definition, each byte read as often as it must be, in any order of programs."""

from contextlib import nullcontext

import pytest
import torch
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, draw, watched

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.storage.fp8 import (
    Float8Weight,
    dequantize_fp8,
    dequantize_fp8_reference,
    quantize_fp8,
)
from peftkit_kernels.storage.fp8.product.config import QuantizeConfig
from peftkit_kernels.storage.fp8.product.passes import quantize, transposed
from peftkit_kernels.storage.fp8.reference import quantize_rows_reference
from peftkit_kernels.storage.fp8.triton_impl import dequantize_into

SHAPES = [(1, 1), (3, 5), (17, 33), (9, 300), (0, 5), (5, 0)]
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def bits(codes):
    return codes.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_gives_the_bits_of_the_definition(shape, scaled, dtype):
    w = draw(*shape)
    w[:1] = 0.0
    q, scale = quantize_fp8(w), torch.linspace(-2, 3, shape[0]) if scaled else None
    expected = dequantize_fp8_reference(q, dtype, scale)
    wide = torch.full((shape[0], shape[1] + 7), torch.nan, dtype=dtype)
    window = wide[:, 3:-4]
    with watched() if 0 not in shape else nullcontext():
        assert torch.equal(dequantize_fp8(q, dtype, row_scale=scale, backend="triton"), expected)
        assert dequantize_fp8(q, out=window, row_scale=scale, backend="triton") is window
    assert torch.equal(window, expected)
    assert wide[:, :3].isnan().all()
    assert wide[:, -4:].isnan().all()


def test_every_code_is_decoded():
    q = Float8Weight(CODES.view(4, 64), torch.tensor([1.0, 3e-5, 7.3, 0.1]))
    found = dequantize_fp8(q, backend="triton")
    torch.testing.assert_close(found, dequantize_fp8_reference(q), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 2


def test_codes_and_out_may_have_any_strides():
    q = quantize_fp8(draw(17, 33))
    codes = torch.zeros(33, 34, dtype=CODES.dtype).t()[::2].copy_(q.codes)
    out = torch.empty(33, 17).t()
    with watched():
        dequantize_fp8(Float8Weight(codes, q.row_scale), out=out, backend="triton")
    assert torch.equal(out, dequantize_fp8_reference(q))


def test_every_byte_is_decoded_once():
    q = quantize_fp8(draw(64, 160))
    out = torch.empty(64, 160, dtype=torch.bfloat16)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        dequantize_into(q, out, None)
    (launch,) = traffic.launches
    codes, written = launch.arguments["codes_ptr"].load, launch.arguments["out_ptr"].store
    for access, tensor in ((codes, q.codes), (written, out)):
        assert access.requested_bytes == access.sector_bytes == tensor.nbytes
    assert traffic.unique_bytes == q.codes.nbytes + out.nbytes + q.row_scale.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "column_scale"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 33), (9, 1100)], ids=str)
def test_rows_get_the_codes_of_the_definition(shape, scaled, dtype):
    x = draw(*shape, dtype=dtype) * 10
    x[:1] = 0.0
    factor = torch.linspace(0.01, 2.0, shape[1]) if scaled else None
    with watched():
        codes, scale = quantize(x, factor)
    expected, expected_scale = quantize_rows_reference(x.float() * factor if scaled else x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bits(codes), bits(expected))


def test_rows_of_ties_are_rounded_to_even():
    # every point half way between two neighbouring codes
    finite = CODES.float()[:127]
    middles = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([middles, -middles, torch.tensor([448.0])])[None]
    codes, scale = quantize(x)
    assert scale == 1.0
    assert torch.equal(bits(codes), bits(quantize_rows_reference(x)[0]))
    assert (bits(codes)[0, :-1] & 1 == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(bad):
    x = draw(5, 700)
    expected, _ = quantize(x)
    x[2, 600] = bad
    codes, scale = quantize(x)
    assert scale.isfinite().tolist() == [True, True, False, True, True]
    others = [0, 1, 3, 4]
    assert torch.equal(bits(codes)[others], bits(expected)[others])
    assert not (codes[2].float() * scale[2]).isfinite().any()
    assert torch.equal(codes.float().isnan(), quantize_rows_reference(x)[0].float().isnan())


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-30, 3e38])
def test_rows_of_any_size(largest):
    x = torch.tensor([[1.0, -0.5, 0.25], [1.0, 1.0, 1.0]])
    x[0] *= largest
    codes, scale = quantize(x)
    expected, expected_scale = quantize_rows_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bits(codes), bits(expected))


def test_rows_may_have_gaps():
    x = torch.full((9, 50), torch.nan)
    x[:, 3:-4] = draw(9, 43)
    with watched():
        codes, _ = quantize(x[:, 3:-4])
    assert torch.equal(bits(codes), bits(quantize_rows_reference(x[:, 3:-4])[0]))


def test_rows_are_read_twice_and_codes_written_once():
    x = draw(64, 512, dtype=torch.bfloat16)
    with watched() as traffic:
        codes, scale = quantize(x)
    (launch,) = traffic.launches
    assert launch.arguments["x_ptr"].load.requested_bytes == 2 * x.nbytes
    written = launch.arguments["codes_ptr"].store
    assert written.requested_bytes == written.sector_bytes == codes.nbytes
    assert traffic.unique_bytes == x.nbytes + codes.nbytes + scale.nbytes


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (130, 257), (64, 128)], ids=str)
def test_transposed_codes(shape):
    q = quantize_fp8(draw(*shape))
    with watched(int32_limit=INT32_LIMIT) as traffic:
        codes = transposed(q)
    assert torch.equal(bits(codes), bits(q.codes))
    assert codes.t().is_contiguous()
    assert traffic.unique_bytes == 2 * q.codes.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [lora_qkv, lora_swiglu_mlp], ids=lambda f: f.__name__)
def test_several_linears(op, dtype):
    """The passes of a GPU without float8: codes by Triton, products of torch."""
    shapes = [(48, 64)] * 3 if op is lora_qkv else [(48, 64), (48, 64), (64, 48)]
    weights = [quantize_fp8(draw(*shape) / 8) for shape in shapes]
    biases = [draw(N, dtype=dtype) for N, _ in shapes]
    loras = [
        LoRA(draw(4, K).requires_grad_(), draw(N, 4).requires_grad_(), 0.1, 0.2, 3)
        for N, K in shapes
    ]
    x = draw(2, 7, 64, dtype=dtype).requires_grad_()
    leaves = [x, *(t for lora in loras for t in (lora.A, lora.B))]
    options = ("silu",) if op is lora_swiglu_mlp else ()

    def run(backend):
        ys = op(x, weights, biases, loras, *options, backend=backend)
        ys = ys if isinstance(ys, tuple) else (ys,)
        return [*ys, *torch.autograd.grad(sum(y.float().square().sum() for y in ys), leaves)]

    with watched() as traffic:
        found = run("triton")
    names = [launch.kernel for launch in traffic.launches]
    assert names.count("quantize_kernel") == (1 + 3 if op is lora_qkv else 2 + 3)
    for ours, theirs in zip(found, run("reference"), strict=True):
        assert torch.cosine_similarity(ours.flatten().float(), theirs.flatten().float(), 0) > 0.999


def test_bits_do_not_depend_on_the_order_of_programs():
    x, q = draw(33, 65), quantize_fp8(draw(130, 140))

    def run():
        codes, scale = quantize(x, config=QuantizeConfig(4, 64))
        return bits(codes), scale, bits(transposed(q)).clone(), dequantize_fp8(q, backend="triton")

    assert_same_bits_in_any_order(run)
