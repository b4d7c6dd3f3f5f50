"""8-bit storage by rows: the same bytes as bitsandbytes, and the definition bit for bit."""

import warnings

import pytest
import torch

from peftkit_kernels.storage.int8 import Int8Weight, dequantize_int8, quantize_int8

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stores_what_bitsandbytes_stores(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.functional import int8_vectorwise_quant
    w = weight(65, 129, dtype=dtype)
    codes, absmax, _ = int8_vectorwise_quant(w)
    q = quantize_int8(w)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.row_absmax, absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
def test_every_way_gives_the_bits_of_the_formula(dtype, scaled):
    q = quantize_int8(weight(17, 33))
    factor = torch.linspace(-2, 3, 17) if scaled else None
    scale = q.row_absmax / 127 * (factor if scaled else 1.0)
    expected = (q.codes.float() * scale[:, None]).to(dtype)
    for backend in ("reference", "torch"):
        assert torch.equal(dequantize_int8(q, dtype, row_scale=factor, backend=backend), expected)
        out = torch.full((17, 40), torch.nan, dtype=dtype)[:, 3:36]
        assert dequantize_int8(q, out=out, row_scale=factor, backend=backend) is out
        assert torch.equal(out, expected)


def test_error_is_half_a_step_at_most():
    w = weight(17, 33)
    q = quantize_int8(w)
    step = q.row_absmax[:, None] / 127
    assert ((dequantize_int8(q) - w).abs() <= 0.5 * step * (1 + 2.0**-20)).all()
    assert q.codes.abs().amax(1).eq(127).all()


def test_rows_of_zeros_and_outliers():
    w = weight(3, 8)
    w[0] = 0.0
    w[1, 2] = -1e5
    q = quantize_int8(w)
    assert not dequantize_int8(q)[0].any()
    assert q.codes[1].tolist() == [0, 0, -127, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)], ids=str)
def test_small_shapes(shape):
    assert dequantize_int8(quantize_int8(weight(*shape))).shape == shape


@pytest.mark.parametrize(
    ("codes", "row_absmax", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4), r"codes is torch.float32 \(4, 4\)"),
        (torch.zeros(4, dtype=torch.int8), torch.zeros(4), r"codes is torch.int8 \(4,\)"),
        (
            torch.zeros(4, 3, dtype=torch.int8),
            torch.zeros(3),
            r"row_absmax is .* \(3,\); .* \(4,\)",
        ),
        (
            torch.zeros(4, 3, dtype=torch.int8),
            torch.zeros(4).half(),
            r"row_absmax is torch.float16",
        ),
    ],
)
def test_storage_that_does_not_fit_is_refused(codes, row_absmax, message):
    with pytest.raises(ValueError, match=message):
        Int8Weight(codes, row_absmax)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": torch.zeros(4, 3)}, r"out is \(4, 3\) on cpu; it must be \(4, 4\)"),
        ({"dtype": torch.int8}, r"dtype is torch.int8"),
        ({"row_scale": torch.zeros(3)}, r"row_scale is torch.float32 \(3,\)"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown; use one of auto, reference"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        dequantize_int8(quantize_int8(torch.ones(4, 4)), **options)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int32)], ids=str)
def test_only_matrices_of_floats_are_quantised(bad):
    with pytest.raises(ValueError, match="pass a floating-point"):
        quantize_int8(bad)
