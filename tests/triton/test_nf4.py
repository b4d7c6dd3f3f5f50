"""NF4 storage by Triton: the bits of the definition, each byte once, in any order of programs."""

from contextlib import nullcontext

import pytest
import torch
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, draw, watched

from peftkit_kernels.storage.nf4 import (
    NF4Weight,
    dequantize_nf4,
    dequantize_nf4_reference,
    quantize_nf4,
)
from peftkit_kernels.storage.nf4.config import DequantizeConfig, QuantizeConfig
from peftkit_kernels.storage.nf4.triton_impl import dequantize_into, quantize
from peftkit_kernels.storage.nf4.weight import BLOCKSIZES, level_table, midpoints

SHAPES = [(1, 1), (3, 5), (7, 64), (17, 33), (33, 136), (70, 300), (0, 8), (4, 0)]
"""The largest has more than 256 blocks, so more than one of nested maxima."""
nesting = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])


def special(*shape, dtype=torch.float32):
    """A weight with a block of zeros, one outlier, subnormal numbers and exact ties between levels."""
    w = draw(*shape).flatten()
    if w.numel() >= 512:
        w[64:128] = 0.0
        w[130] = -1e4
        w[192:256] = 1e-42
        w[256:320] = torch.linspace(-1, 1, 64)
        w[260:275] = midpoints(level_table())
    return w.view(shape).to(dtype)


def assert_equal(q, expected):
    assert q.shape == expected.shape
    for actual, value in zip(q.tensors(), expected.tensors(), strict=True):
        assert torch.equal(actual, value)


@nesting
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantises_to_the_bits_of_the_definition(blocksize, dtype, nested):
    for shape in ((3, 5), (17, 129), (33, 256)):
        w = special(*shape, dtype=dtype)
        with watched():
            q = quantize_nf4(w, blocksize, nested=nested, backend="triton")
        assert_equal(q, quantize_nf4(w, blocksize, nested=nested, backend="reference"))


def test_a_bad_weight_spoils_its_block_as_in_the_definition():
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = draw(4, 64)
        w[1, 3] = bad
        q, expected = (quantize_nf4(w, backend=backend) for backend in ("triton", "reference"))
        assert torch.equal(q.packed, expected.packed)
        assert torch.equal(q.absmax.nan_to_num(-1.0), expected.absmax.nan_to_num(-1.0))
        assert q.absmax.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize("layout", ["transposed", "one_axis", "three_axes", "unaligned"])
def test_quantises_any_layout(layout):
    w = {
        "transposed": draw(33, 20).T,
        "one_axis": draw(133),
        "three_axes": draw(3, 5, 7),
        "unaligned": draw(1 + 20 * 33)[1:].view(20, 33),
    }[layout]
    q = quantize_nf4(w, 32, backend="triton")
    assert_equal(q, quantize_nf4(w, 32, backend="reference"))


@nesting
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantises_to_the_bits_of_the_definition(shape, blocksize, scaled, nested):
    q = quantize_nf4(special(*shape), blocksize, nested=nested)
    scale = torch.linspace(-2, 3, shape[0]) if scaled else None
    for dtype in DTYPES:
        with watched() if 0 not in shape else nullcontext():
            actual = dequantize_nf4(q, dtype, row_scale=scale, backend="triton")
        assert torch.equal(actual, dequantize_nf4_reference(q, dtype, scale))


@pytest.mark.parametrize("K", [3, 20, 21, 24, 64])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
def test_out_may_be_any_window(K, scaled):
    q = quantize_nf4(draw(9, K), 32)
    scale = torch.linspace(-2, 3, 9) if scaled else None
    expected = dequantize_nf4_reference(q, torch.bfloat16, scale)
    wide = torch.full((9, K + 9), torch.nan, dtype=torch.bfloat16)
    window = wide[:, 4 : K + 4]
    with watched():
        assert dequantize_nf4(q, out=window, row_scale=scale, backend="triton") is window
    assert torch.equal(window, expected)
    assert wide[:, :4].isnan().all()
    assert wide[:, K + 4 :].isnan().all()
    transposed = torch.empty(K, 9, dtype=torch.bfloat16).T
    actual = dequantize_nf4(q, out=transposed, row_scale=scale, backend="triton")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 7), (130,)], ids=str)
def test_other_than_matrices(shape):
    q, scale = quantize_nf4(draw(*shape), 32), torch.arange(1.0, shape[0] + 1)
    actual = dequantize_nf4(q, row_scale=scale, backend="triton")
    assert torch.equal(actual, dequantize_nf4_reference(q, row_scale=scale))


@pytest.mark.parametrize("layout", ["unaligned", "spread", "column"])
def test_packed_bytes_may_lie_anywhere(layout):
    q = quantize_nf4(draw(9, 24))
    count = q.packed.numel()
    packed = {
        "unaligned": torch.zeros(count + 3, dtype=torch.uint8)[3:].copy_(q.packed),
        "spread": torch.zeros(2 * count, dtype=torch.uint8)[::2].copy_(q.packed),
        "column": q.packed.view(-1, 1),
    }[layout]
    again = NF4Weight(packed, q.absmax, q.shape, q.blocksize)
    with watched():
        actual = dequantize_nf4(again, backend="triton")
    assert torch.equal(actual, dequantize_nf4_reference(q))


@nesting
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
def test_every_byte_is_read_once(scaled, nested):
    """0.5 + 2 bytes a weight, 4 / blocksize for the maxima (nested 1 / blocksize + 4 / (256 blocksize))."""
    q = quantize_nf4(draw(64, 160), nested=nested)
    out, scale = torch.empty(64, 160, dtype=torch.bfloat16), torch.ones(64)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        dequantize_into(q, out, scale if scaled else None)
    (launch,) = traffic.launches
    packed, written = launch.arguments["packed_ptr"].load, launch.arguments["out_ptr"].store
    for access, tensor in ((packed, q.packed), (written, out)):
        assert access.requested_bytes == access.unique_bytes == tensor.nbytes
        assert access.sector_bytes == tensor.nbytes
    used = q.nested.code[q.absmax.long().unique()].nbytes if nested else 0
    small = 4 + q.nested.absmax.nbytes + used if nested else 0
    rows = scale.nbytes if scaled else 0
    assert traffic.unique_bytes == q.packed.nbytes + out.nbytes + q.absmax.nbytes + small + rows


def test_quantising_reads_the_weight_once():
    w = draw(64, 160, dtype=torch.bfloat16)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        packed, absmax = quantize(w, 64)
    assert traffic.unique_bytes == w.nbytes + packed.nbytes + absmax.nbytes
    assert traffic.launches[0].arguments["weight_ptr"].load.requested_bytes == w.nbytes


def test_results_do_not_depend_on_the_order_of_programs():
    w = draw(17, 72)
    q, scale = quantize_nf4(w, nested=True), torch.linspace(-2, 3, 17)

    def run():
        out = torch.empty(17, 80)[:, :72]
        dequantize_into(q, out, scale, config=DequantizeConfig(32))
        return out, *quantize(w, 64, config=QuantizeConfig(4))

    assert_same_bits_in_any_order(run)


@nesting
def test_compiled_without_graph_break(nested):
    w = draw(9, 33)
    stored = quantize_nf4(w, 32, nested=True)

    def store_and_read(w):
        # nested codes come from a table that is made once, outside compiled code
        q = stored if nested else quantize_nf4(w, 32, backend="triton")
        out = torch.zeros(9, 40)[:, :33]
        dequantize_nf4(q, out=out, row_scale=w[:, 0].contiguous(), backend="triton")
        return dequantize_nf4(q, torch.bfloat16, backend="triton"), out

    torch.compiler.reset()
    compiled = torch.compile(store_and_read, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(w), store_and_read(w), strict=True):
        assert torch.equal(actual, expected)


def test_opcheck():
    q = quantize_nf4(draw(9, 33), 32, nested=True)
    arguments = q.tensors(), q.layout(), torch.ones(9), torch.zeros(9, 33)
    torch.library.opcheck(torch.ops.peftkit.dequantize_nf4.default, arguments)
    torch.library.opcheck(torch.ops.peftkit.quantize_nf4.default, (draw(9, 33), 32))


def test_float64_is_refused_by_name():
    q = quantize_nf4(draw(9, 33))
    with pytest.raises(ValueError, match=r"backend='triton': dequantize_nf4 .*torch.float64"):
        dequantize_nf4(q, torch.float64, backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton': quantize_nf4 .*torch.float64"):
        quantize_nf4(draw(9, 33).double(), backend="triton")
