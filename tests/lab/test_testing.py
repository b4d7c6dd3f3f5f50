"""The measures the other tests rely on: they accept what is right and notice what is nearly right."""

import pytest
import torch

from lab.testing import Bound, Made, assert_no_worse_than, kept_for_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def product(dtype, K=200):
    """Operands of a product, and the bound of the product stored in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(30, K, generator=generator).to(dtype) for _ in range(2))
    return x, w, (Bound.of(x) @ Bound.of(w).T).round(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_product_is_within_its_bound(dtype):
    x, w, bound = product(dtype)
    assert 0 < bound.check(x @ w.T) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: x @ w.T * 1.02,
        lambda x, w: x[:, :-1] @ w[:, :-1].T,
        lambda x, w: (x @ w.T).bfloat16().div(3).mul(3).to(x.dtype),
        lambda x, w: (x @ w.T).T,
        lambda x, w: torch.full_like(x @ w.T, torch.nan),
        lambda x, w: (x @ w.T).index_fill(0, torch.tensor([3]), torch.inf),
        lambda x, w: torch.zeros_like(x @ w.T),
    ],
    ids=["scale", "term", "rounding", "transposed", "nan", "inf", "zero"],
)
def test_a_wrong_product_is_not(dtype, wrong):
    x, w, bound = product(dtype)
    with pytest.raises(AssertionError, match=r"y: .* times the error bound at"):
        bound.check(wrong(x, w), "y")


def test_a_sum_in_too_narrow_a_dtype_is_noticed():
    x = torch.rand(4, 4000).bfloat16()
    bound = Bound.of(x).sum(1).round(torch.bfloat16)
    bound.check(x.float().sum(1).bfloat16())
    narrow = torch.zeros(4, dtype=torch.bfloat16)
    for column in x.T:
        narrow += column
    with pytest.raises(AssertionError, match="times the error bound"):
        bound.check(narrow)


def test_errors_add_up_through_an_expression():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(50, 50, generator=generator) for _ in range(3))
    A, B, C = (Bound.of(t) for t in (a, b, c))
    bound = (C.addmm(A, B, 0.3) * B + A).map(torch.tanh, 1.0, 4.0).sum(1, keepdim=True)
    actual = torch.tanh((c + 0.3 * (a @ b)) * b + a).sum(1, keepdim=True)
    assert bound.check(actual) > 0
    difference = A[:, :3] - B[:, :3]
    assert difference.check(a[:, :3] - b[:, :3]) > 0
    with pytest.raises(AssertionError, match="times the error bound"):
        difference.check(a[:, :3] + b[:, :3])
    joined = Bound.cat([A, B], 0).reshape(50, 100)
    assert torch.equal(joined.value, torch.cat([a, b]).double().reshape(50, 100))


def test_shapes_have_to_agree_and_nothing_is_in_bounds():
    _, _, bound = product(torch.float32)
    with pytest.raises(AssertionError, match=r"y has shape \(30, 1\), expected \(30, 30\)"):
        bound.check(torch.zeros(30, 1), "y")
    empty = Bound.of(torch.zeros(0, 3))
    assert empty.check(torch.zeros(0, 3)) == 0.0


def test_no_worse_than_plain_torch():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = (truth + 1e-5).float()
    assert_no_worse_than((truth - 1.9e-5).float(), plain, truth)
    with pytest.raises(AssertionError, match="y: error"):
        assert_no_worse_than((truth - 3e-5).float(), plain, truth, "y")
    few = truth[:31], plain[:31]
    assert_no_worse_than((few[0] - 3.9e-5).float(), few[1], few[0])
    with pytest.raises(AssertionError, match="y: error"):
        assert_no_worse_than((few[0] - 5e-5).float(), few[1], few[0], "y")
    with pytest.raises(AssertionError, match="a wrong result would pass"):
        assert_no_worse_than(plain, (truth + 1).float(), truth)
    with pytest.raises(AssertionError, match=r"is torch\.float64"):
        assert_no_worse_than(plain.double(), plain, truth)
    with pytest.raises(AssertionError, match="shapes"):
        assert_no_worse_than(plain[:1], plain, truth)


def test_kept_counts_distinct_storages_without_weights():
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(4, 4)
    with kept_for_backward(weight) as kept:
        y = (x @ weight) * (x @ weight)
    assert y.requires_grad
    assert kept.total_bytes == 2 * 8 * 4 * 4


def test_made_sees_new_storages_and_counts_ops():
    known = torch.zeros(4, 8)
    with Made(known) as made:
        known.t()
        kept = known + 1
        kept[:2].mul_(2.0)
    assert list(made.storages) == [kept.untyped_storage().data_ptr()]
    assert made.largest_bytes == 4 * 32
    assert made.calls == 4


def test_a_bound_that_is_negative_or_undefined_is_refused():
    for error in (-1.0, torch.nan):
        bound = Bound.of(torch.ones(3))
        bound.error[1] = error
        with pytest.raises(AssertionError, match="y: the error bound is negative or NaN"):
            bound.check(torch.ones(3), "y")
