"""NF4 storage: the same bytes as bitsandbytes, and the definition bit for bit by every way to decode it."""

import functools
import warnings

import pytest
import torch

from peftkit_kernels.storage.nf4 import (
    NestedAbsmax,
    NF4Weight,
    dequantize_nf4,
    dequantize_nf4_reference,
    quantize_nf4,
)
from peftkit_kernels.storage.nf4.weight import BLOCKSIZES, LEVELS, dynamic_code

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 5), (7, 64), (17, 33), (65, 129), (0, 8), (4, 0)]
nesting = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])


def weight(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@functools.cache
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional

    return bitsandbytes.functional


def by_formula(q, row_scale=None):
    """Every element on its own, from Python integers; only the products are in float32."""
    packed, absmax = q.packed.reshape(-1).tolist(), q.block_absmax()
    values = torch.empty(torch.Size(q.shape).numel())
    for i in range(values.numel()):
        code = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        values[i] = torch.tensor(LEVELS[code]) * absmax[i // q.blocksize]
    values = values.view(q.shape)
    return values if row_scale is None else values * row_scale[:, None]


@nesting
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_stores_what_bitsandbytes_stores(blocksize, dtype, nested):
    w = weight(40, 4096, dtype=dtype)
    packed, state = library().quantize_4bit(
        w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )
    q = quantize_nf4(w, blocksize, nested=nested)
    assert torch.equal(q.packed, packed.view(-1))
    if not nested:
        assert torch.equal(q.absmax, state.absmax)
        return
    assert torch.equal(q.nested.code, state.state2.code)
    assert torch.equal(q.nested.absmax, state.state2.absmax)
    assert torch.equal(q.nested.offset, state.offset)
    # on the CPU the library finds the code of a maximum in a table of 65,536 entries over [-1, 1]: within one entry of
    # the middle between two codes it may take the other one
    differs = (q.absmax != state.absmax).nonzero().view(-1)
    block = differs // 256
    exact = quantize_nf4(w, blocksize).absmax[differs] - state.offset
    exact /= q.nested.absmax[block]
    middle = (
        q.nested.code[q.absmax[differs].int()] + q.nested.code[state.absmax[differs].int()]
    ) / 2
    assert ((exact - middle).abs() <= 2.0**-15).all()
    assert differs.numel() <= 0.01 * q.absmax.numel()


@nesting
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 1024])
def test_reads_what_bitsandbytes_stored(blocksize, dtype, nested):
    # its own CPU kernel is right only where rows are whole blocks, and above 1024 it leaves its native code
    w = weight(24, 1024, dtype=dtype)
    packed, state = library().quantize_4bit(
        w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )
    second = state.state2
    inner = (
        NestedAbsmax(second.code, second.absmax, state.offset, second.blocksize) if nested else None
    )
    q = NF4Weight(packed, state.absmax, tuple(state.shape), state.blocksize, inner)
    assert torch.equal(dequantize_nf4(q, dtype), library().dequantize_4bit(packed, state))


@nesting
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_gives_the_bits_of_the_formula(shape, blocksize, scaled, nested, monkeypatch):
    q = quantize_nf4(weight(*shape), blocksize, nested=nested)
    scale = torch.linspace(-2, 3, shape[0]) if scaled else None
    expected = by_formula(q, scale)
    for dtype in DTYPES:
        rounded = expected.to(dtype)
        assert torch.equal(dequantize_nf4_reference(q, dtype, scale), rounded)
        assert torch.equal(dequantize_nf4(q, dtype, row_scale=scale), rounded)
        with monkeypatch.context() as patch:
            patch.setattr("peftkit_kernels.native.library.loaded", lambda: None)
            assert torch.equal(dequantize_nf4(q, dtype, row_scale=scale), rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_out_may_be_any_window(dtype, backend):
    q = quantize_nf4(weight(9, 21), 32)
    expected = dequantize_nf4_reference(q, dtype)
    wide = torch.full((9, 30), torch.nan, dtype=dtype)
    window = wide[:, 4:25]
    assert dequantize_nf4(q, out=window, backend=backend) is window
    assert torch.equal(window, expected)
    assert wide[:, :4].isnan().all()
    assert wide[:, 25:].isnan().all()
    transposed = torch.empty(21, 9, dtype=dtype).T
    assert torch.equal(dequantize_nf4(q, out=transposed, backend=backend), expected)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 7), (130,)], ids=str)
def test_other_than_matrices(shape):
    w = weight(*shape)
    q = quantize_nf4(w, 32)
    assert torch.equal(dequantize_nf4(q), dequantize_nf4_reference(q))
    assert dequantize_nf4(q).shape == shape
    scale = torch.arange(1.0, shape[0] + 1)
    assert torch.equal(
        dequantize_nf4(q, row_scale=scale), dequantize_nf4_reference(q, row_scale=scale)
    )


def test_larger_than_one_decoded_chunk():
    q = quantize_nf4(weight(200, 1001))
    assert torch.equal(dequantize_nf4(q, torch.bfloat16), by_formula_of_rows(q).bfloat16())


def by_formula_of_rows(q):
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)[: torch.Size(q.shape).numel()]
    absmax = q.block_absmax()[torch.arange(codes.numel()) // q.blocksize]
    return (torch.tensor(LEVELS)[codes.long()] * absmax).view(q.shape)


def test_codes_are_the_nearest_levels():
    w = weight(64, 64)
    q = quantize_nf4(w)
    scaled = w / q.absmax.view(64, 1)
    distance = (scaled[..., None] - torch.tensor(LEVELS)).abs()
    off = (dequantize_nf4(q) / q.absmax.view(64, 1) - scaled).abs()
    # the last bits of the division decide ties
    assert (off <= distance.amin(-1) + 2.0**-22).all()
    rms = ((dequantize_nf4(q) - w).square().mean() / w.square().mean()).sqrt()
    assert 0.085 < rms < 0.1


@nesting
def test_special_blocks(nested):
    w = weight(8, 64)
    w[1] = 0.0
    w[2] = 0.0
    w[2, 5] = -1e4
    w[3] = 1e-42
    q = quantize_nf4(w, nested=nested)
    values = dequantize_nf4(q)
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(8, 64)
    assert (codes[1] == 7).all()
    assert not values[1].any()
    assert codes[2, 5] == 0
    assert (codes[2][torch.arange(64) != 5] == 7).all()
    assert values.isfinite().all()
    if not nested:
        assert values[2, 5] == -1e4


def test_an_odd_number_of_elements_is_padded_with_zero():
    q = quantize_nf4(weight(3, 5))
    assert q.packed.numel() == 8
    assert q.packed[-1] & 15 == 7
    assert dequantize_nf4(q).shape == (3, 5)


def test_bits_a_weight():
    for nested, bits in ((False, 4.5), (True, 4.127)):
        q = quantize_nf4(torch.zeros(512, 1024), nested=nested)
        tensors = [q.packed, q.absmax, *([q.nested.absmax] if nested else [])]
        stored = sum(t.numel() * t.element_size() for t in tensors)
        assert stored * 8 / (512 * 1024) == pytest.approx(bits, abs=1e-3)


def test_strided_weights_and_bytes():
    w = weight(16, 64)
    assert torch.equal(quantize_nf4(w.T.contiguous().T).packed, quantize_nf4(w).packed)
    q = quantize_nf4(w)
    spread = torch.zeros(2 * q.packed.numel(), dtype=torch.uint8)[::2].copy_(q.packed)
    again = NF4Weight(spread, q.absmax, q.shape, q.blocksize)
    assert torch.equal(dequantize_nf4(again), dequantize_nf4(q))


def test_bits_do_not_depend_on_the_number_of_threads():
    q = quantize_nf4(weight(64, 1001))
    one = dequantize_nf4(q)
    torch.set_num_threads(3)
    assert torch.equal(dequantize_nf4(q), one)
    torch.set_num_threads(1)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(dynamic_code(), library().create_dynamic_map())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"packed": torch.zeros(31, dtype=torch.uint8)},
            r"packed is torch.uint8 with 31 .* 32 elements of uint8",
        ),
        ({"packed": torch.zeros(32)}, r"packed is torch.float32"),
        ({"absmax": torch.zeros(2)}, r"absmax is torch.float32 with 2 elements; 1 blocks of 64"),
        ({"absmax": torch.zeros(1, dtype=torch.uint8)}, r"absmax is torch.uint8"),
        ({"blocksize": 48}, r"blocksize=48 is not one of 32, 64"),
        (
            {
                "nested": NestedAbsmax(dynamic_code(), torch.zeros(2), torch.zeros(())),
                "absmax": torch.zeros(1, dtype=torch.uint8),
            },
            r"nested.absmax has 2 elements; .* need 1",
        ),
    ],
)
def test_storage_that_does_not_fit_is_refused(change, message):
    parts = {
        "packed": torch.zeros(32, dtype=torch.uint8),
        "absmax": torch.zeros(1),
        "shape": (8, 8),
    }
    assert NF4Weight(**parts).shape == (8, 8)
    with pytest.raises(ValueError, match=message):
        NF4Weight(**parts | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": torch.zeros(8, 7)}, r"out is \(8, 7\) on cpu; it must be \(8, 8\)"),
        ({"out": torch.zeros(8, 8, dtype=torch.int8)}, r"out is torch.int8; use one of"),
        ({"dtype": torch.int8}, r"dtype is torch.int8; use one of"),
        (
            {"row_scale": torch.zeros(7)},
            r"row_scale is torch.float32 \(7,\); it must be float32 \(8,\)",
        ),
        ({"row_scale": torch.zeros(8).double()}, r"row_scale is torch.float64"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown; use one of auto, reference"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        dequantize_nf4(quantize_nf4(torch.zeros(8, 8)), **options)


def test_only_known_blocks_and_real_weights_are_quantised():
    with pytest.raises(ValueError, match="blocksize=100 is not one of"):
        quantize_nf4(torch.zeros(4, 4), 100)
    with pytest.raises(ValueError, match=r"weight is torch.int32; pass a floating-point weight"):
        quantize_nf4(torch.zeros(4, 4, dtype=torch.int32))
