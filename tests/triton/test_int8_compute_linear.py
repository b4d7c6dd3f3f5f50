"""``int8_compute_linear`` by Triton: the codes of the definition, bounds of everything after them, bytes, and what it keeps."""

import pytest
import torch
from lora_cases import LAYOUTS, MIXED, Shape, draw, gradients, subsets
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    products,
    scaled,
    watched,
)
from triton_cases import draw as normal
from triton_linear import Linear, output_grad

from lab.testing import UNIT_ROUNDOFF, Bound, kept_for_backward
from peftkit_kernels.core.dropout import dropout_mask
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.ops.lora_linear import schedule as steps
from peftkit_kernels.storage.int8 import Int8ComputeWeight, Int8Weight, quantize_int8
from peftkit_kernels.storage.int8.product.config import Int8GemmConfig, QuantizeConfig
from peftkit_kernels.storage.int8.product.passes import outliers_of, product, quantize
from peftkit_kernels.storage.int8.product.reference import outlier_columns
from peftkit_kernels.storage.int8.reference import quantize_rows_reference

N = 29
TRAINED = ("x", "bias", "A", "B")
SEED = 2**62 + 12345


def make(N=N, **options):
    """``x``, the stored weight and the projection it was made from."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    return x, quantize_int8(part.weight.float()), part


def leaves_of(x, part):
    return {"x": x, **{name: t for name, t in part.tensors().items() if name != "weight"}}


def run(x, q, part, dy, **options):
    y = int8_compute_linear(x, q, part.bias, part.lora, backend="triton", **options)
    results = {"y": y.detach()}
    return results | (gradients(y, dy, leaves_of(x, part)) if y.requires_grad else {})


def integer_product(values, codes):
    """``values codes`` with the rows of ``values`` in 8 bits: the sum is exact, then rounded and scaled in float32."""
    quantised, absmax = quantize_rows_reference(values)
    exact = quantised.double() @ codes.double()
    total = Bound(exact, torch.zeros_like(exact), UNIT_ROUNDOFF[torch.float32])
    return total.round(torch.float32) * (absmax / 127).double()[:, None]


def bounds(x, q, part, dy, threshold=None):
    """The bound of every result, where the kernels round."""
    dtype, lora = x.dtype, part.lora
    rows, grads = x.detach().reshape(-1, x.shape[-1]), dy.reshape(-1, q.shape[0])
    skip = None if threshold is None else outlier_columns(rows, threshold)
    inner = rows.float() if skip is None else rows.float().masked_fill(skip, 0.0)
    y = integer_product(inner, q.codes.t())
    if skip is not None and skip.any():
        y = y.addmm(Bound.of(rows[:, skip]), Bound.of(q.codes[:, skip].float()).T)
    y = y * q.row_scale().double()
    dx = integer_product(grads.float() * q.row_scale(), q.codes)
    expected = {"bias": Bound.of(grads).sum(0).round(dtype)}
    if lora is not None:
        linear = Linear(x, part, "fused")
        expected |= linear.backward(dy)
        y = y + scaled(linear.narrow_product(linear.s, Bound.of(linear.B).T), lora.scale)
        ds = scaled(Bound.of(grads) @ Bound.of(linear.B), lora.scale).round(linear.wide)
        update = scaled(linear.narrow_product(ds, Bound.of(linear.A)), 1.0, lora.p)
        if lora.p:
            update = update * dropout_mask(*update.value.shape, lora.p, lora.seed)
        dx = dx + update
    if part.bias is not None:
        y = y + Bound.of(part.bias)
    return expected | {"y": y.round(dtype), "x": dx.round(dtype)}


def check(case, layout="contiguous", threshold=None, **watch):
    """Run one case, watched, and compare all of it; returns the names compared."""
    x, q, part = case
    dy = draw((*x.shape[:-1], q.shape[0]), x.dtype, torch.Generator().manual_seed(1), layout)
    with watched(**watch):
        results = run(x, q, part, dy, threshold=threshold)
    expected = bounds(x, q, part, dy, threshold)
    for name, value in results.items():
        assert value.dtype == (part.lora.A.dtype if name in ("A", "B") else x.dtype)
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return set(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 131), (33, 64)], ids=str)
@pytest.mark.parametrize("scaled_columns", [False, True], ids=["plain", "column_scale"])
def test_codes_are_those_of_the_definition(shape, dtype, scaled_columns):
    x = (normal(*shape) * 10).to(dtype)
    x[0] = 0.0
    x[-1, 0] = 3e4
    if shape[0] > 2:
        x[1] = torch.arange(shape[1]).to(dtype) + 0.5  # ties
        x[1, 0] = 127.0
    factor = torch.linspace(0.1, 2.0, shape[1]) if scaled_columns else None
    wide = x.float() if factor is None else x.float() * factor
    expected, absmax = quantize_rows_reference(wide)
    for config in (None, QuantizeConfig(16, 16)):
        with watched(int32_limit=INT32_LIMIT):
            codes, step, s = quantize(x, None, column_scale=factor, config=config)
        assert s is None
        assert torch.equal(codes, expected)
        assert torch.equal(step, absmax / 127)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_quantises_and_shrinks(dtype, p):
    x, A = normal(37, 72, dtype=dtype), normal(8, 72, dtype=dtype)
    skip = torch.arange(72) % 5 == 0
    kept = torch.where(dropout_mask(37, 72, p, SEED), x, 0) if p else x
    expected = scaled(products(dtype)(kept) @ products(dtype)(A).T, -1.7, p).round(dtype)
    for config in (None, QuantizeConfig(16, 16)):
        with watched() as traffic:
            codes, _, s = quantize(x, A, scale=-1.7, p=p, seed=SEED, skip=skip, config=config)
        expected.check(s, "s")
        inner = x.float().masked_fill(skip, 0.0)
        assert torch.equal(codes, quantize_rows_reference(inner)[0])
        read = traffic.launches[0].arguments["x_ptr"].load
        # from DRAM once, and once more from L2
        assert read.unique_bytes == x.nbytes
        assert read.requested_bytes == 2 * x.nbytes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_spoils_its_row(bad):
    x = torch.ones(3, 40)
    x[1, 17] = bad
    _, step, _ = quantize(x, None)
    assert step.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, p):
    case = make(x=(17, 33), dtype=dtype, factors=factors, bias=bias, p=p)
    assert check(case) == {"y", "x", "A", "B"} | ({"bias"} if bias else set())


@pytest.mark.parametrize(("rank", "bias"), [(0, True), (0, False), (1, False), (64, True)])
@pytest.mark.parametrize("rows", [1, 3, 16, 65])
def test_any_number_of_rows_and_rank(rows, rank, bias):
    names = {"y", "x"} | ({"A", "B"} if rank else set()) | ({"bias"} if bias else set())
    assert check(make(x=(rows, 31), rank=rank, dtype=torch.bfloat16, bias=bias)) == names


@pytest.mark.parametrize(("K", "width"), [(1, 1), (7, 130), (64, 64), (301, 3)])
def test_any_width(K, width):
    assert len(check(make(x=(17, K), N=width, p=0.1))) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout):
    assert len(check(make(x=(2, 5, 33), layout=layout, p=0.1), layout)) == 5


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scale(scale):
    assert len(check(make(scale=scale))) == 5


@pytest.mark.parametrize("layout", ["wide_rows", "transposed"])
def test_codes_may_have_any_strides(layout):
    x, q, part = make(x=(17, 33))
    codes = torch.zeros(N, 40, dtype=torch.int8)[:, 3:36].copy_(q.codes)
    if layout == "transposed":
        codes = torch.zeros(33, 2 * N, dtype=torch.int8).t()[::2].copy_(q.codes)
    dy = output_grad(x, part)
    strided = run(x, Int8Weight(codes, q.row_absmax), part, dy)
    for name, value in run(x, q, part, dy).items():
        assert torch.equal(value, strided[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlier_columns_are_multiplied_in_full_precision(dtype):
    x, q, part = make(x=(17, 33), dtype=dtype)
    with torch.no_grad():
        x[:, 4] = torch.linspace(-60, 60, 17)
        x[3, 20] = 8.0
    assert outlier_columns(x.detach(), 6.0).nonzero().flatten().tolist() == [4, 20]
    assert len(check((x, q, part), threshold=6.0)) == 5
    dy = output_grad(x, part)
    plain, without = run(x, q, part, dy), run(x, q, part, dy, threshold=1e3)
    split = run(x, q, part, dy, threshold=6.0)
    for name, value in plain.items():
        assert torch.equal(value, without[name])
        assert torch.equal(value, split[name]) == (name != "y")


@pytest.mark.parametrize("width", [17, 40, 1500])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_outlier_columns_are_found(share, width):
    """And listed in order, all on the device."""
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(150, width + 3, generator=generator).clamp(-2, 2).bfloat16()
    x = wide[:, :width]
    large = torch.rand(width, generator=generator) < share
    x[torch.randint(150, (width,), generator=generator)[large], large] = -7.0
    with watched(int32_limit=INT32_LIMIT):
        found = outliers_of(x, 7.0)  # a magnitude that reaches the limit counts
    assert torch.equal(found.skip, large)
    count = int(found.columns[0])
    assert count == large.sum()
    assert torch.equal(found.columns[1 : 1 + count], large.nonzero().flatten().int())


def test_outlier_columns_of_strided_rows():
    x, q, part = make(x=(17, 64), dtype=torch.bfloat16)
    with torch.no_grad():
        x[2, 5:9] = 9.0
    wide = torch.zeros(17, 80, dtype=torch.bfloat16)
    wide[:, :64] = x.detach()
    strided = wide[:, :64].requires_grad_()
    dy = output_grad(x, part)
    expected = run(x, q, part, dy, threshold=6.0)
    for name, value in run(strided, q, part, dy, threshold=6.0).items():
        assert torch.equal(value, expected[name]), name


def test_many_outlier_columns():
    x, q, part = make(x=(17, 64), dtype=torch.bfloat16)
    with torch.no_grad():
        x[2, 5:45] = 9.0
    assert len(check((x, q, part), threshold=6.0)) == 5


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    x, q, part = case = make(x=(17, 33), trained=trained, p=0.1)
    with kept_for_backward(*leaves_of(x.clone(), part).values(), *q.tensors()) as kept:
        y = int8_compute_linear(x, q, part.bias, part.lora, backend="triton")
    assert y.requires_grad
    assert kept.total_bytes == 4 * 17 * (33 * ("A" in trained) + 4 * ("B" in trained))
    assert check(case) == {"y", *trained}


def test_offsets_of_rows_do_not_overflow():
    case = make(x=(70, 80), N=88, rank=8, dtype=torch.bfloat16, p=0.1)
    assert len(check(case, int32_limit=INT32_LIMIT)) == 5


def test_results_do_not_depend_on_the_order_of_programs():
    x, q, part = make(x=(130, 40), N=150, rank=8, dtype=torch.bfloat16, p=0.1)
    dy = output_grad(x, part)
    assert_same_bits_in_any_order(lambda: tuple(run(x, q, part, dy).values()))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bytes_of_the_product(backward):
    """README: the codes of both sides, update and result, each once; requested are they once a tile."""
    codes, weight = (torch.ones(size, 64, dtype=torch.int8) for size in (48, 96))
    if backward:
        weight = torch.ones(64, 96, dtype=torch.int8).t()
    steps, s, B = torch.ones(48), normal(48, 16), normal(96, 16)
    column = None if backward else torch.ones(96)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        y = product(
            *(codes, weight, steps, column, s, B, 0.5, torch.float32),
            config=Int8GemmConfig(16, 32, 32, 2),
        )
    tensors = (codes, weight, steps, s, B, y)
    assert traffic.unique_bytes == sum(t.nbytes for t in tensors) + (0 if backward else 4 * 96)
    launch = traffic.launches[0].arguments
    assert launch["x_ptr"].load.requested_bytes == codes.nbytes * 3
    assert launch["w_ptr"].load.requested_bytes == weight.nbytes * 3
    assert launch["y_ptr"].store.requested_bytes == y.nbytes


@pytest.mark.parametrize("fault", [1.01, -1.0])
def test_a_wrong_step_is_noticed(fault):
    x, q, part = make(x=(17, 33), dtype=torch.bfloat16)
    dy = output_grad(x, part)
    wrong = Int8Weight(q.codes, q.row_absmax * abs(fault))
    if fault < 0:
        wrong = Int8Weight(-q.codes, q.row_absmax)
    with pytest.raises(AssertionError, match="times the error bound"):
        bounds(x, q, part, dy)["y"].check(run(x, wrong, part, dy)["y"])


@pytest.mark.parametrize("outlier", [None, 1.5])
def test_opcheck(outlier):
    x, q, part = make(x=(3, 33), dtype=torch.bfloat16, factors=torch.float32)
    weight = Int8ComputeWeight(*q.tensors(), outlier, backward_in_8_bits=True)
    opcheck(steps, steps.Linears(x, [steps.Linear(weight, part.bias, part.lora)]))
