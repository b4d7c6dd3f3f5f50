"""``int8_compute_linear``: the codes of the definition, and everything after them within its running-error bound."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    Shape,
    draw,
    gradients,
    subsets,
)
from markers import needs_native

from lab.testing import Bound, Made, kept_for_backward
from peftkit_kernels import native
from peftkit_kernels.core import workspace
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.native import library
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.storage.int8 import Int8Weight, dequantize_int8, quantize_int8
from peftkit_kernels.storage.int8.product import torch_impl as implementation
from peftkit_kernels.storage.int8.reference import quantize_rows_reference

N = 29
TRAINED = ("x", "bias", "A", "B")


def make(**options):
    """``x``, the stored weight and the projection it was made from."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    return x, quantize_int8(part.weight.float()), part


def leaves_of(x, part):
    return {"x": x, **{name: t for name, t in part.tensors().items() if name != "weight"}}


def run(x, q, part, dy, **options):
    y = int8_compute_linear(x, q, part.bias, part.lora, **options)
    results = {"y": y.detach()}
    return results | (gradients(y, dy, leaves_of(x, part)) if y.requires_grad else {})


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def scaled_product(values, codes, dtype):
    """The bound of ``values codes`` with the rows of ``values`` in 8 bits, before anything is added."""
    quantised, absmax = quantize_rows_reference(values)
    exact = Bound.of((quantised.double() @ codes.double()).to(torch.float64))
    exact.unit = Bound.of(torch.empty(0, dtype=dtype)).unit
    return exact.round(wide(dtype)) * (absmax / 127)[:, None]


def bounds(x, q, part, dy):
    """The bound of each result of ``run``; roundings where the torch schedule has them."""
    dtype = x.dtype
    rows, grads = x.detach().reshape(-1, x.shape[-1]), dy.reshape(-1, N)
    linear = Linear(Bound.of(rows), part, dtype)
    linear.forward()
    y = scaled_product(rows.to(wide(dtype)), q.codes.t(), dtype) * q.row_scale()[None]
    if part.bias is not None:
        y = y + Bound.of(part.bias)
    results = linear.backward(Bound.of(grads))
    dx = scaled_product(grads.to(wide(dtype)) * q.row_scale(), q.codes, dtype)
    if part.lora is not None:
        t = (linear.B * part.lora.scale).round(wide(dtype))
        y = y.addmm(linear.s, t.T)
        dx = linear.add_update(dx.round(dtype)) if part.lora.p else dx.addmm(linear.ds, linear.A)
    results |= {"y": y.round(dtype), "x": dx.round(dtype)}
    shapes = {"y": dy.shape, "x": x.shape}
    return {k: v.reshape(*shapes[k]) if k in shapes else v for k, v in results.items()}


def check(case, layout="contiguous", **options):
    x, q, part = case
    dy = draw((*x.shape[:-1], N), x.dtype, torch.Generator().manual_seed(1), layout)
    results, expected = run(x, q, part, dy, **options), bounds(x, q, part, dy)
    for name, value in results.items():
        assert value.dtype == (part.lora.A.dtype if name in "AB" else x.dtype)
        expected[name].check(value, name)
    return set(results)


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, p):
    case = make(x=(17, 33), dtype=dtype, factors=factors, bias=bias, p=p)
    assert check(case) == {"y", "x", "A", "B"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("rank", [0, 1, 16, 24])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 65])
def test_any_number_of_rows_and_rank(rows, rank):
    for dtype in (torch.float32, torch.bfloat16):
        case = make(x=(rows, 31), rank=rank, dtype=dtype)
        assert check(case) == {"y", "x", "bias"} | ({"A", "B"} if rank else set())


@pytest.mark.parametrize("K", [1, 7, 64, 301, 2048])
def test_any_width(K):
    assert len(check(make(x=(17, K)))) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    assert len(check(make(x=(2, 5, 33), layout=layout), layout)) == 5


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scale(scale):
    assert len(check(make(scale=scale))) == 5


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    for p in (0.0, 0.1):
        assert check(make(trained=trained, p=p)) == {"y", *trained}


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_keeps_what_the_readme_says(trained):
    x, q, part = make(x=(17, 33), trained=trained)
    with kept_for_backward(*leaves_of(x.clone(), part).values(), *q.tensors()) as kept:
        y = int8_compute_linear(x, q, part.bias, part.lora)
    assert y.requires_grad
    assert kept.total_bytes == 4 * 17 * (33 * ("A" in trained) + 4 * ("B" in trained))


@pytest.mark.parametrize("switch", ["no native code", "AVX2", "neither"])
def test_machines_without_native_passes_or_8_bit_products(switch, monkeypatch):
    if switch == "no native code":
        monkeypatch.setattr(library, "loaded", lambda: None)
    else:
        monkeypatch.setattr(implementation, "multiplies_int8", lambda: False)
    if switch != "AVX2":
        monkeypatch.setattr(native, "has_int8_products", lambda: False)
    for dtype in DTYPES:
        assert len(check(make(x=(17, 301), dtype=dtype))) == 5


def test_near_the_product_in_full_precision():
    x, q, _ = make(x=(64, 256), rank=0, bias=False)
    y = int8_compute_linear(x, q)
    exact = x @ dequantize_int8(q).T
    # independent errors of a third of half a step each: absmax / 127 / sqrt(12) of every element of x
    step = x.abs().amax(1, keepdim=True) / 127
    noise = step / 12**0.5 * dequantize_int8(q).square().sum(1).sqrt()
    deviation = ((y - exact) / noise).square().mean().sqrt()
    assert 0.8 < deviation < 1.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlier_columns_are_multiplied_in_full_precision(dtype):
    x, q, _ = make(x=(17, 33), dtype=dtype)
    with torch.no_grad():
        x[:, 4] = torch.linspace(-60, 60, 17)
        x[3, 20] = 8.0
    weight = dequantize_int8(q).double()
    exact = x.detach().double() @ weight.T
    inner = x.detach().double().clone()
    inner[:, [4, 20]] = 0.0

    def off(**options):
        y = int8_compute_linear(x, q, **options)
        assert y.dtype == dtype
        return (y.double() - exact).abs().amax()

    # what rounding the rest to 8 bits may cost at most, and what is rounded to the dtype
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 2.0**-20)
    half_steps = inner.abs().amax(1, keepdim=True) / 254 * weight.abs().sum(1)
    allowed = (half_steps + 4 * unit * (x.double().abs() @ weight.abs().T)).amax()
    for backend in ("torch", "reference"):
        assert off(threshold=6.0, backend=backend) <= allowed
    if dtype is torch.float32:
        assert off() > 3 * off(threshold=6.0)
    assert torch.equal(int8_compute_linear(x, q, threshold=1e3), int8_compute_linear(x, q))


def test_the_gradient_with_outliers_is_that_without():
    x, q, part = make(x=(17, 33))
    dy = draw((17, N), torch.float32, torch.Generator().manual_seed(1))
    plain, actual = run(x, q, part, dy), run(x, q, part, dy, threshold=1.0)
    assert not torch.equal(plain["y"], actual["y"])
    for name in TRAINED:
        assert torch.equal(plain[name], actual[name]), name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_the_reference_agrees(p, threshold):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x, q, part = make(x=(17, 33), dtype=dtype, p=p)
        dy = draw((17, N), dtype, torch.Generator().manual_seed(1))
        actual = run(x, q, part, dy, threshold=threshold)
        expected = run(x, q, part, dy, threshold=threshold, backend="reference")
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def test_gradients_of_the_reference():
    # of x it is a definition (quantising has no derivative); the rest is differentiated
    x, q, part = make(x=(3, 5), rank=2, dtype=torch.float64, p=0.3, trained=TRAINED[1:])

    def apply(bias, A, B):
        lora = LoRA(A, B, *part.lora.numbers())
        return int8_compute_linear(x, q, bias, lora, backend="reference")

    assert torch.autograd.gradcheck(apply, (part.bias, part.lora.A, part.lora.B))
    leaf = x.clone().requires_grad_()
    dy = draw((3, N), torch.float64, torch.Generator().manual_seed(1))
    lora = LoRA(part.lora.A, part.lora.B, 0.7)
    y = int8_compute_linear(leaf, q, None, lora, backend="reference")
    codes, absmax = quantize_rows_reference(dy * q.row_scale())
    expected = codes.double() @ q.codes.double() * (absmax / 127)[:, None]
    expected += 0.7 * dy @ lora.B @ lora.A
    torch.testing.assert_close(
        torch.autograd.grad(y, leaf, dy)[0], expected, rtol=1e-13, atol=1e-13
    )


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 1001), (4, 64)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "column_scale"])
def test_native_codes_are_those_of_the_definition(shape, scaled):
    x = draw(shape, torch.float32, torch.Generator().manual_seed(0)) * 10
    x[0] = 0.0
    x[-1, 0] = 1e30
    factor = torch.linspace(0.1, 2.0, shape[1]) if scaled else None
    codes = torch.empty(shape, dtype=torch.int8)
    absmax = native.quantize_rows(x, factor, codes)
    expected, largest = quantize_rows_reference(x * factor if scaled else x)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, largest)


@needs_native
def test_native_codes_round_the_factor_as_the_definition_does():
    # rows of ties between two codes: the last bit of the factor decides, which one division rounds otherwise
    m = torch.arange(1.0, 200.0)[:, None]
    x = m * (torch.arange(64) + 0.5)
    x[:, 0] = 127 * m[:, 0]
    codes = torch.empty(199, 64, dtype=torch.int8)
    native.quantize_rows(x, None, codes)
    expected, absmax = quantize_rows_reference(x)
    assert torch.equal(codes, expected)
    divided = x * (torch.full_like(absmax, 127.0) / absmax)[:, None]
    assert not torch.equal(divided.round().to(torch.int8), expected)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_is_the_largest_of_its_row(bad):
    x = torch.ones(3, 40)
    x[1, 17] = bad
    absmax = native.quantize_rows(x, None, torch.empty(3, 40, dtype=torch.int8))
    assert absmax.isfinite().tolist() == [True, False, True]


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads():
    x, q, part = make(x=(65, 301))
    one = int8_compute_linear(x, q, part.bias, part.lora)
    torch.set_num_threads(3)
    assert torch.equal(int8_compute_linear(x, q, part.bias, part.lora), one)
    torch.set_num_threads(1)


def test_codes_and_sums_lie_in_the_workspace():
    x, q, part = make(x=(64, 128), trained=())
    int8_compute_linear(x, q, part.bias, part.lora)
    codes = workspace.take((64, 128), torch.int8, x.device)
    expected, _ = quantize_rows_reference(x)
    assert torch.equal(codes, expected) == (native.obstacle() is None)


def test_the_weight_is_never_decoded():
    x, q, part = make(x=(3, 2048), rank=2)
    with Made(q.codes) as made:
        int8_compute_linear(x, q, part.bias, part.lora).sum().backward()
    decoded_bytes = 4 * N * 2048
    # a processor without 8-bit products multiplies the codes as float32
    has_products = implementation.multiplies_int8() or native.has_int8_products()
    assert made.largest_bytes <= decoded_bytes - has_products


@pytest.mark.parametrize("layout", ["wide_rows", "transposed"])
def test_codes_may_have_any_strides(layout):
    x, q, part = make(x=(17, 33))
    expected = int8_compute_linear(x, q, part.bias, part.lora)
    codes = torch.zeros(N, 40, dtype=torch.int8)[:, 3:36].copy_(q.codes)
    if layout == "transposed":
        codes = torch.zeros(33, 2 * N, dtype=torch.int8).t()[::2].copy_(q.codes)
    strided = Int8Weight(codes, q.row_absmax)
    actual = int8_compute_linear(x, strided, part.bias, part.lora)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": torch.ones(N, 33)}, r"q is a Tensor; it must be of type Int8Weight"),
        ({"q": quantize_int8(torch.ones(N, 32))}, r"q has shape \(29, 32\) and x \(3, 33\)"),
        ({"bias": torch.zeros(28)}, r"bias has shape \(28,\)"),
        ({"lora": LoRA(torch.ones(4, 32), torch.ones(N, 4), 1.0)}, r"lora: A \(4, 32\)"),
        ({"threshold": 0.0}, r"threshold=0.0 makes every column an outlier; pass a positive"),
        ({"threshold": float("nan")}, r"threshold=nan"),
    ],
)
def test_errors_name_the_argument(options, message):
    arguments = {"q": quantize_int8(torch.ones(N, 33))} | options
    with pytest.raises(ValueError, match=message):
        int8_compute_linear(torch.zeros(3, 33), **arguments)


def test_widths_whose_sums_overflow_are_refused():
    q = Int8Weight(torch.zeros(1, 133_145, dtype=torch.int8), torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"more than 133144 products overflow 32 bits; use Int8Weight"
    ):
        int8_compute_linear(torch.zeros(1, 133_145), q)
