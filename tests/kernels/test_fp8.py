"""Float8 storage: the nearest codes, their decoded values, and what is refused."""

import pytest
import torch
from lora_cases import DTYPES, draw

from peftkit_kernels.storage.fp8 import Float8Weight, dequantize_fp8, op, quantize_fp8

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""Every code; 0x7f and 0xff are NaN."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_code_is_the_nearest_one(dtype):
    weight = draw((17, 200), dtype, torch.Generator().manual_seed(0))
    q = quantize_fp8(weight)
    finite = CODES.double()[~CODES.double().isnan()]
    scaled = weight.double() / q.row_scale.double()[:, None]
    nearest = (scaled[..., None] - finite).abs().amin(-1)
    # the reciprocal of the scale is rounded, so at a tie both neighbours are right
    assert ((scaled - q.codes.double()).abs() <= nearest + 2.0**-22 * scaled.abs()).all()
    assert torch.equal(q.codes.double().abs().amax(1), torch.full((17,), 448.0).double())


def test_the_error_of_a_weight():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = dequantize_fp8(quantize_fp8(weight)) - weight
    scale = weight.abs().amax(1, keepdim=True) / 448
    # half a unit of three bits of mantissa; below 2⁻⁶ the unit is 2⁻⁹
    assert (error.abs() <= torch.maximum(weight.abs() / 16, scale / 1024) * (1 + 1e-6)).all()
    assert 0.02 < error.norm() / weight.norm() < 0.03


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_gives_the_bits_of_the_definition(dtype, scaled):
    q = Float8Weight(CODES.view(4, 64), torch.tensor([1.0, 3.0e-5, 7.3, 0.1]))
    factor = torch.tensor([0.3, -2.0, 1.0, 5.0]) if scaled else None
    scale = q.row_scale if factor is None else q.row_scale * factor
    expected = (q.codes.float() * scale[:, None]).to(dtype)
    out = torch.empty(64, 4, dtype=dtype).t()
    for backend in ("torch", "reference"):
        found = dequantize_fp8(q, dtype, row_scale=factor, backend=backend)
        assert dequantize_fp8(q, out=out, row_scale=factor, backend=backend) is out
        for values in (found, out):
            torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-30, 3e38])
def test_rows_of_any_size(largest):
    weight = torch.tensor([[1.0, -0.5, 0.25], [1.0, 1.0, 1.0]])
    weight[0] *= largest
    q = quantize_fp8(weight)
    assert q.row_scale.isfinite().all()
    # a scale below the normal numbers would have no reciprocal, so tiny rows lose digits
    unit = (weight.abs().amax(1) / 448).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    error = (dequantize_fp8(q) - weight).abs().double()
    assert (error <= torch.maximum(weight.abs() / 16, unit / 1024).double() * (1 + 1e-6)).all()


def test_slices_may_be_quantised_one_by_one(monkeypatch):
    weight = draw((12, 40), torch.bfloat16, torch.Generator().manual_seed(0))
    whole, parts = quantize_fp8(weight), [quantize_fp8(part) for part in weight.split(5)]
    assert torch.equal(whole.codes.float(), torch.cat([part.codes.float() for part in parts]))
    assert torch.equal(whole.row_scale, torch.cat([part.row_scale for part in parts]))
    monkeypatch.setattr(op, "_CHUNK", 100)
    again = quantize_fp8(weight)
    assert torch.equal(again.codes.float(), whole.codes.float())
    assert torch.equal(again.row_scale, whole.row_scale)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_fp8(torch.ones(3)), r"weight is torch.float32 \(3,\); pass \[N, K\]"),
        (lambda: quantize_fp8(torch.ones(3, 2).to(CODES.dtype)), "weight is torch.float8_e4m3fn"),
        (lambda: Float8Weight(torch.ones(2, 3), torch.ones(2)), "codes is torch.float32"),
        (
            lambda: Float8Weight(CODES.view(2, 128), torch.ones(3)),
            r"row_scale is .* \(3,\); it must",
        ),
        (
            lambda: Float8Weight(CODES.view(2, 128), torch.ones(2).double()),
            r"row_scale is torch.float64",
        ),
        (
            lambda: dequantize_fp8(quantize_fp8(torch.ones(2, 3)), torch.int8),
            "dtype is torch.int8; use one of",
        ),
        (
            lambda: dequantize_fp8(quantize_fp8(torch.ones(2, 3)), out=torch.empty(3, 2)),
            r"out is \(3, 2\) on cpu; it must be \(2, 3\)",
        ),
        (
            lambda: dequantize_fp8(quantize_fp8(torch.ones(2, 3)), row_scale=torch.ones(3)),
            r"row_scale is torch.float32 \(3,\); it must be float32 \(2,\)",
        ),
    ],
)
def test_storage_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
