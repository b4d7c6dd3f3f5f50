"""8-bit storage by Triton: the bits of the definition, each byte once, in any order of programs."""

from contextlib import nullcontext

import pytest
import torch
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, draw, watched

from peftkit_kernels.storage.by_rows import DequantizeConfig
from peftkit_kernels.storage.int8 import (
    Int8Weight,
    dequantize_int8,
    dequantize_int8_reference,
    quantize_int8,
)
from peftkit_kernels.storage.int8.triton_impl import dequantize_into

SHAPES = [(1, 1), (3, 5), (17, 33), (9, 300), (0, 5), (5, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_the_bits_of_the_definition(shape, scaled, dtype):
    w = draw(*shape)
    w[:1] = 0.0
    q, scale = quantize_int8(w), torch.linspace(-2, 3, shape[0]) if scaled else None
    expected = dequantize_int8_reference(q, dtype, scale)
    wide = torch.full((shape[0], shape[1] + 7), torch.nan, dtype=dtype)
    window = wide[:, 3:-4]
    with watched() if 0 not in shape else nullcontext():
        assert torch.equal(dequantize_int8(q, dtype, row_scale=scale, backend="triton"), expected)
        assert dequantize_int8(q, out=window, row_scale=scale, backend="triton") is window
    assert torch.equal(window, expected)
    assert wide[:, :3].isnan().all()
    assert wide[:, -4:].isnan().all()


def test_codes_and_out_may_have_any_strides():
    q = quantize_int8(draw(17, 33))
    codes = torch.zeros(33, 34, dtype=torch.int8).t()[::2].copy_(q.codes)
    out = torch.empty(33, 17).t()
    with watched():
        dequantize_int8(Int8Weight(codes, q.row_absmax), out=out, backend="triton")
    assert torch.equal(out, dequantize_int8_reference(q))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
def test_every_byte_is_read_once(scaled):
    q, scale = quantize_int8(draw(64, 160)), torch.ones(64)
    out = torch.empty(64, 160, dtype=torch.bfloat16)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        dequantize_into(q, out, scale if scaled else None)
    (launch,) = traffic.launches
    codes, written = launch.arguments["codes_ptr"].load, launch.arguments["out_ptr"].store
    for access, tensor in ((codes, q.codes), (written, out)):
        assert access.requested_bytes == access.sector_bytes == tensor.nbytes
    factors = q.row_absmax.nbytes + (scale.nbytes if scaled else 0)
    assert traffic.unique_bytes == q.codes.nbytes + out.nbytes + factors


def test_results_do_not_depend_on_the_order_of_programs():
    q = quantize_int8(draw(17, 72))
    assert_same_bits_in_any_order(
        lambda: [dequantize_into(q, torch.empty(17, 72), None, config=DequantizeConfig(8, 16))]
    )


def test_compiled_without_graph_break():
    q, scale = quantize_int8(draw(9, 33)), torch.linspace(-2, 3, 9)

    def read(scale):
        return dequantize_int8(q, torch.bfloat16, row_scale=scale, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scale), read(scale))


def test_opcheck():
    arguments = *quantize_int8(draw(9, 33)).tensors(), torch.ones(9), torch.zeros(9, 33)
    torch.library.opcheck(torch.ops.peftkit.dequantize_int8.default, arguments)


def test_float64_is_refused_by_name():
    q = quantize_int8(draw(9, 33))
    with pytest.raises(ValueError, match=r"backend='triton': dequantize_int8 .*torch.float64"):
        dequantize_int8(q, torch.float64, backend="triton")
