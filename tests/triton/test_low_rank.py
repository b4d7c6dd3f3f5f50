"""The rank-r passes: every element within its bound, bytes as the formulas say, no race, no overflow, no access out of bounds."""

import pytest
import torch
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    draw,
    dropped,
    scaled,
    watched,
)

from lab.interp import faithful
from lab.testing import Bound
from peftkit_kernels.core.dropout import dropout_mask
from peftkit_kernels.low_rank import passes
from peftkit_kernels.low_rank.config import ExpandConfig, GemmConfig, ShrinkConfig, TallConfig

SEED = 2**62 + 12345
M, N, K, R, SCALE = 70, 88, 72, 8, -1.7
SMALL = {
    "shrink": ShrinkConfig(16, 16, 2),
    "expand": ExpandConfig(16, 32),
    "tall": TallConfig(16, 32, 32, 4),
    "gemm": GemmConfig(32, 32, 16, 2),
}
"""Tiles small enough that every loop and grid axis has several."""

sizes = pytest.mark.parametrize(
    ("rows", "width", "rank"),
    [
        (1, 1, 1),
        (3, 7, 4),
        (16, 64, 16),
        (17, 131, 24),
        (64, 40, 64),
        (65, 33, 128),
        (200, 8, 3),
        (70, 65, 150),
        (33, 40, 300),
        (17, 24, 512),
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_p = pytest.mark.parametrize("p", [0.0, 0.1, 1.0])


def shrunk(x, A, p, scale):
    product = Bound.of(dropped(x, p, SEED)) @ Bound.of(A).T
    return scaled(product, scale, p).round(x.dtype)


def expanded(s, B, scale, bias=None, p=0.0):
    y = scaled(Bound.of(s) @ Bound.of(B).T, scale, p)
    if p:
        y = y * dropout_mask(*y.value.shape, p, SEED)
    if bias is not None:
        y = y + Bound.of(bias)
    return y.round(s.dtype)


def grad_of_factor(left, right, scale, dtype, p=0.0):
    return scaled(Bound.of(left).T @ Bound.of(dropped(right, p, SEED)), scale, p).round(dtype)


@every_dtype
@every_p
def test_shrink(dtype, p):
    x, A = draw(M, K, dtype=dtype), draw(R, K, dtype=dtype)
    for config in (None, SMALL["shrink"], ShrinkConfig(32, 32, 1)):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            s = passes.shrink(x, A, p, SEED, scale=SCALE, config=config)
        shrunk(x, A, p, SCALE).check(s, "s")
        launch = traffic.launches[0].arguments
        assert launch["x_ptr"].load.requested_bytes == x.nbytes
        assert launch["x_ptr"].load.unique_bytes == x.nbytes
        if dtype.itemsize == 2 or p == 0:
            rows_of_sectors = K * dtype.itemsize % 32 == 0
            assert not rows_of_sectors or launch["x_ptr"].load.sector_bytes == x.nbytes


@every_dtype
@every_p
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_expand(dtype, p, with_bias):
    s, B = draw(M, R, dtype=dtype), draw(N, R, dtype=dtype)
    bias = draw(N, dtype=dtype) if with_bias else None
    for config in (None, SMALL["expand"]):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            y = passes.expand(s, B, SCALE, bias=bias, p=p, seed=SEED, config=config)
        expanded(s, B, SCALE, bias, p).check(y, "y")
        assert traffic.unique_bytes == sum(t.nbytes for t in (s, B, y)) + N * with_bias * y.itemsize
        assert traffic.launches[0].arguments["y_ptr"].store.requested_bytes == y.nbytes


@every_dtype
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_one_pass_over_dy_gives_both_gradients(dtype, grad_dtype):
    columns = 80  # a multiple of 16: one block of them, whose sums need no second launch
    dy, s = draw(M, columns, dtype=dtype), draw(M, R, dtype=dtype)
    B = draw(columns, R, dtype=dtype)
    for config in (None, SMALL["tall"]):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            dB, ds = passes.grad_b_and_s(dy, s, B, SCALE, grad_dtype, config=config)
        grad_of_factor(dy, s, SCALE, grad_dtype).check(dB, "dB")
        scaled(Bound.of(dy) @ Bound.of(B), SCALE).round(dtype).check(ds, "ds")
        assert dB.is_contiguous()
        read = traffic.launches[0].arguments["x_ptr"].load
        assert read.requested_bytes == read.unique_bytes == dy.nbytes
        # one launch adds up the partial results of both
        assert len(traffic.launches) == (1 if config is None else 2)


@every_dtype
@every_p
def test_grad_a(dtype, p):
    ds, x = draw(M, R, dtype=dtype), draw(M, K, dtype=dtype)
    for config in (None, SMALL["tall"]):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            dA = passes.grad_a(ds, x, torch.float32, p, SEED, config=config)
        grad_of_factor(ds, x, 1.0, torch.float32, p).check(dA, "dA")
        read = traffic.launches[0].arguments["x_ptr"].load
        assert read.requested_bytes == read.unique_bytes == x.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_beside_16_bit_rows(dtype):
    """The small s and ds are float32 and exact to float32; what is as wide as the rows is rounded once."""
    x, weight = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype)
    A, B, s = draw(R, K), draw(N, R), draw(M, R)
    dy, p = draw(M, N, dtype=dtype), 0.1
    wide = passes.shrink(x, A, p, SEED, scale=SCALE, config=SMALL["shrink"])
    scaled(Bound.of(dropped(x, p, SEED)) @ Bound.of(A).T, SCALE, p).round(torch.float32).check(wide)
    update = scaled(Bound.of(s).halves() @ Bound.of(B).T.halves(), SCALE)
    y = passes.expand(s, B, SCALE, dtype=dtype, config=SMALL["expand"])
    update.round(dtype).check(y, "y")
    y = passes.gemm_lora(x, weight, s, B, SCALE, config=SMALL["gemm"])
    update.addmm(Bound.of(x), Bound.of(weight).T).round(dtype).check(y, "y")
    dB, ds = passes.grad_b_and_s(dy, s, B, SCALE, torch.float32, config=SMALL["tall"])
    grad_of_factor(dy, s, SCALE, torch.float32).check(dB, "dB")
    scaled(Bound.of(dy) @ Bound.of(B), SCALE).round(torch.float32).check(ds, "ds")
    dA = passes.grad_a(s, x, torch.float32, p, SEED, config=SMALL["tall"])
    grad_of_factor(s, x, 1.0, torch.float32, p).check(dA, "dA")


@every_dtype
@every_p
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_gemm_lora(dtype, p, backward):
    x, s, bias = draw(M, K, dtype=dtype), draw(M, R, dtype=dtype), draw(N, dtype=dtype)
    weight, B = (draw(K, N, dtype=dtype).t(), draw(R, N, dtype=dtype).t())
    if not backward:
        weight, B = weight.contiguous(), B.contiguous()
    update = scaled(Bound.of(s) @ Bound.of(B).T, SCALE, p)
    if p:
        update = update * dropout_mask(M, N, p, SEED)
    expected = (update.addmm(Bound.of(x), Bound.of(weight).T) + Bound.of(bias)).round(dtype)
    for config in (None, SMALL["gemm"]):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            y = passes.gemm_lora(x, weight, s, B, SCALE, bias=bias, p=p, seed=SEED, config=config)
        expected.check(y, "y")
        tensors = (x, weight, s, B, bias, y)
        assert traffic.unique_bytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_sums_of_partials(transposed):
    partial = draw(3, 80, 70)
    shape = (70, 80) if transposed else (80, 70)
    out = torch.empty(shape, dtype=torch.bfloat16)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        total = out.t() if transposed else out
        passes.add_up(partial, total)
    Bound.of(partial).sum(0).round(torch.bfloat16).check(total)
    assert traffic.unique_bytes == partial.nbytes + total.nbytes


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 13])
def test_many_sums_at_once_are_those_one_by_one(count):
    """Of different lengths, shapes, layouts and dtypes, in any order of programs."""
    partials = [draw(1 + i % 4, 3 + 11 * i, 5 + 16 * (i % 3), seed=i) for i in range(count)]
    dtypes = [torch.bfloat16, torch.float32, torch.float16]

    def results():
        found = []
        for i, partial in enumerate(partials):
            rows, columns = partial.shape[1:]
            out = torch.full((rows, columns + 3), 7.0, dtype=dtypes[i % 3])
            found.append(out.t().contiguous().t() if i % 2 else out)
        return found, [out[:, : partials[i].shape[2]] for i, out in enumerate(found)]

    alone, parts = results()
    for partial, part in zip(partials, parts, strict=True):
        passes.add_up(partial, part)

    def together():
        whole, parts = results()
        sums = passes.Sums()
        for partial, part in zip(partials, parts, strict=True):
            sums.add(partial, part)
        with watched(int32_limit=INT32_LIMIT) as traffic:
            sums.finish()
        assert len(traffic.launches) == -(-count // 6)
        return whole

    for expected, found in zip(alone, together(), strict=True):
        assert torch.equal(expected, found)
    assert_same_bits_in_any_order(together)


@sizes
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_size(rows, width, rank, p):
    dtype = torch.bfloat16
    x, A = draw(rows, width, dtype=dtype), draw(rank, width, dtype=dtype)
    B, dy = draw(37, rank, dtype=dtype), draw(rows, 37, dtype=dtype)
    with watched():
        s = passes.shrink(x, A, p, SEED)
        y = passes.expand(s, B, SCALE)
        dB, ds = passes.grad_b_and_s(dy, s, B, SCALE, dtype)
        dA = passes.grad_a(ds, x, dtype, p, SEED)
        dx = passes.expand(ds, A.t(), 1.0, p=p, seed=SEED)
    shrunk(x, A, p, 1.0).check(s, "s")
    expanded(s, B, SCALE).check(y, "y")
    grad_of_factor(dy, s, SCALE, dtype).check(dB, "dB")
    scaled(Bound.of(dy) @ Bound.of(B), SCALE).round(dtype).check(ds, "ds")
    grad_of_factor(ds, x, 1.0, dtype, p).check(dA, "dA")
    expanded(ds, A.t(), 1.0, p=p).check(dx, "dx")


@pytest.mark.parametrize("view", ["wide", "unaligned", "expanded", "transposed"])
def test_rows_may_have_any_distance(view):
    dtype = torch.bfloat16
    wide = draw(M, K + 9, dtype=dtype)
    x = {
        "wide": wide[:, :K],
        "unaligned": wide[:, 1 : K + 1],
        "expanded": wide[:1, :K].expand(M, K),
        "transposed": draw(K, M, dtype=dtype).t(),
    }[view]
    A, s = draw(R, K, dtype=dtype), draw(M, R, dtype=dtype)
    weight, B = draw(N, K, dtype=dtype), draw(N, R, dtype=dtype)
    with watched():
        shrunk(x, A, 0.1, 1.0).check(passes.shrink(x, A, 0.1, SEED))
        grad_of_factor(s, x, 1.0, dtype).check(passes.grad_a(s, x, dtype))
        y = passes.gemm_lora(x, weight, s, B, SCALE)
        update = scaled(Bound.of(s) @ Bound.of(B).T, SCALE)
    update.addmm(Bound.of(x), Bound.of(weight).T).round(dtype).check(y)


def test_results_do_not_depend_on_the_order_of_programs():
    x, A, dy = draw(M, K), draw(R, K), draw(M, N)
    s, B, weight = draw(M, R), draw(N, R), draw(N, K)

    def run():
        return (
            passes.shrink(x, A, 0.1, SEED, config=SMALL["shrink"]),
            passes.expand(s, B, SCALE, p=0.1, seed=SEED, config=SMALL["expand"]),
            *passes.grad_b_and_s(dy, s, B, SCALE, torch.float32, config=SMALL["tall"]),
            passes.grad_a(s, x, torch.float32, 0.1, SEED, config=SMALL["tall"]),
            passes.gemm_lora(x, weight, s, B, SCALE, config=SMALL["gemm"]),
        )

    assert_same_bits_in_any_order(run)


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 - 1, 2**32, SEED, 2**63 - 1])
def test_the_mask_is_the_rule_whatever_the_tiles(seed):
    """Ones through every pass that drops leave a pattern, which has to be that of ``dropout_mask``."""
    rows, columns, p = 35, 53, 0.4
    expected = dropout_mask(rows, columns, p, seed).float()
    ones, eye = torch.ones(rows, columns), torch.eye(columns)
    kept = (expected * (1 / 0.6)).round(decimals=3)
    for block in (16, 32):
        shrink, expand = (
            ShrinkConfig(block, 64 // block * 8, 1),
            ExpandConfig(block, 64 // block * 8),
        )
        tall = TallConfig(block, 64 // block * 8, 64, 4)
        s = passes.shrink(ones, eye, p, seed, config=shrink)
        y = passes.expand(
            torch.ones(rows, 1), torch.ones(columns, 1), 1.0, p=p, seed=seed, config=expand
        )
        g = passes.grad_a(torch.eye(rows), ones, torch.float32, p, seed, config=tall)
        gemm = passes.gemm_lora(
            *(torch.zeros(rows, 16), torch.zeros(columns, 16)),
            *(torch.ones(rows, 1), torch.ones(columns, 1), 1.0),
            p=p,
            seed=seed,
            config=GemmConfig(block, 32, 16),
        )
        for name, result in {"shrink": s, "expand": y, "grad_a": g, "gemm": gemm}.items():
            assert torch.equal(result.round(decimals=3), kept), name


def test_tf32_where_torch_allows_it():
    x, A = draw(M, K), draw(R, K)
    exact = shrunk(x, A, 0.0, 1.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        s = passes.shrink(x, A)
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(AssertionError, match="times the error bound"):
        exact.check(s)
    (Bound.of(x).tf32() @ Bound.of(A).T.tf32()).check(s)
    with faithful(tf32=False):
        exact.check(passes.shrink(x, A))


def test_a_bad_row_spoils_itself_only():
    x, A, s, B = draw(M, K), draw(R, K), draw(M, R), draw(N, R)
    weight = draw(N, K)
    for bad in (torch.nan, torch.inf):
        x[2, 1] = bad
        for result in (passes.shrink(x, A), passes.gemm_lora(x, weight, s, B, 1.0)):
            spoilt = ~result.isfinite().all(1)
            assert spoilt.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("fault", [1.01, -1.0])
def test_a_wrong_scale_is_noticed(fault):
    x, A = draw(M, K, dtype=torch.bfloat16), draw(R, K, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="times the error bound"):
        shrunk(x, A, 0.1, fault).check(passes.shrink(x, A, 0.1, SEED))
