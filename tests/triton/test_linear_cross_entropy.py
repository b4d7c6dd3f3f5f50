"""The cross-entropy pass by Triton: every loss, log-sum-exp and gradient within its bound, bytes, ignored rows, options."""

import math

import cross_entropy_cases as cases
import pytest
import torch
from triton_cases import INT32_LIMIT, assert_same_bits_in_any_order, draw, watched

from peftkit_kernels.linear_cross_entropy import RowLoss
from peftkit_kernels.linear_cross_entropy.config import RowConfig
from peftkit_kernels.linear_cross_entropy.triton_impl import xent_rows_triton_
from peftkit_kernels.testing import Bound, assert_no_worse_than

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "scaled": {"logit_scale": 0.25},
    "all": {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 2.0},
}
EXP2_ULPS, LOG2_ULPS = 2.0, 2.0
"""Errors of the GPU's approximations, CUDA C++ Programming Guide, table of intrinsic functions."""


def constant(value):
    return Bound.of(torch.tensor(value, dtype=torch.float64)).round(torch.float32)


def in_float32(exact, like):
    return Bound(exact.value, exact.error, like.unit)


def row_bounds(z, target, block_v):
    """Bounds of (loss, lse, dz) of plain cross entropy."""
    scaled = Bound.of(z)
    y = scaled * in_float32(constant(math.log2(math.e)), scaled)
    top = y.value.amax(1, keepdim=True)
    # a running sum is multiplied by exp2(old - new maximum) once a block and at the end, each with an exp2 and a rounding
    spread = float((top - y.value.amin(1, keepdim=True)).max())
    rescalings = -(-z.shape[1] // block_v) + 2
    ulps = rescalings * (EXP2_ULPS + 1 + math.log(2) * spread)
    difference = y - Bound(top, torch.zeros_like(top), y.unit)
    slope = math.log(2) * torch.exp2(difference.value + difference.error)
    p = difference.map(torch.exp2, slope, ulps, size=torch.exp2)
    total = p.sum(1, keepdim=True)
    log = total.map(torch.log2, 1 / (math.log(2) * (total.value - total.error)), LOG2_ULPS)
    lse2 = log + Bound(top, torch.zeros_like(top), y.unit)
    lse = lse2 * in_float32(constant(math.log(2)), lse2)
    loss = (lse - Bound.of(z.gather(1, target[:, None]))).round(torch.float32)
    argument = y - lse2
    slope = math.log(2) * torch.exp2(argument.value + argument.error)
    one_hot = torch.nn.functional.one_hot(target, z.shape[1]).double()
    dz = argument.map(torch.exp2, slope, EXP2_ULPS, size=torch.exp2) - Bound(
        one_hot, 0 * one_hot, y.unit
    )
    return loss[:, 0], lse[:, 0], dz.round(z.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 100, 257, 1031])
def test_rows_are_within_their_bounds(dtype, V):
    z, target = (draw(12, V) * 5).to(dtype), torch.arange(12) % V
    for config in (None, RowConfig(64, 4)):
        out = z.clone()
        with watched() as traffic:
            loss, lse = xent_rows_triton_(
                out, target, RowLoss(), ignored=None, want_grad=True, config=config
            )
        expected = row_bounds(z, target, 64)
        for name, value, bound in zip(
            ("loss", "lse", "dz"), (loss, lse, out), expected, strict=True
        ):
            bound.check(value, name)
        logits = traffic.launches[0].arguments["z_ptr"]
        assert logits.load.unique_bytes == logits.store.requested_bytes == z.nbytes
        # two reads of each logit, and one more of that of the target
        assert logits.load.requested_bytes == 2 * z.nbytes + 12 * z.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_every_gradient(option, reduction, dtype):
    tensors, target = cases.inputs(dtype, shape=(2, 9))
    options = OPTIONS[option] | {"reduction": reduction, "lora": True, "bias": True, "chunk": 5}
    truth = cases.loss_and_grads(
        tensors, target, dtype=torch.float64, backend="reference", **options
    )
    plain = cases.loss_and_grads(tensors, target, backend="torch", **options)
    with watched():
        actual = cases.loss_and_grads(tensors, target, backend="triton", **options)
    assert actual.keys() == truth.keys()
    # an exponent here has four roundings of the size of the logits (times log2(e), lse twice, their difference), in torch one
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], truth[name], name, factor=4.0)


def test_ignored_rows_cost_nothing_and_stay_zero():
    z = draw(6, 300).bfloat16()
    out, ignored = z.clone(), torch.tensor([False, True, False, True, False, False])
    target = torch.tensor([0, 0, 299, 7, 5, 1])
    with watched() as traffic:
        loss, lse = xent_rows_triton_(out, target, RowLoss(), ignored=ignored, want_grad=True)
    assert not out[ignored].any()
    assert not loss[ignored].any()
    assert not lse[ignored].any()
    assert out[~ignored].any(1).all()
    read = traffic.launches[0].arguments["z_ptr"].load
    assert read.unique_bytes == 4 * 300 * 2


@pytest.mark.parametrize("target", [-100, 300, 2**40])
def test_targets_outside_the_vocabulary_touch_no_foreign_memory(target):
    z = draw(1, 300)
    with watched():
        loss, _ = xent_rows_triton_(
            z, torch.tensor([target]), RowLoss(), ignored=None, want_grad=True
        )
    assert loss.item() == 0
    assert not z.any()


def test_without_a_gradient_the_logits_are_left():
    z = draw(5, 70)
    before = z.clone()
    with watched() as traffic:
        xent_rows_triton_(z, torch.arange(5), RowLoss(), ignored=None, want_grad=False)
    assert torch.equal(z, before)
    assert traffic.launches[0].arguments["z_ptr"].store.requested_bytes == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_only(bad):
    z = draw(5, 70)
    z[2, 3] = bad
    loss, _ = xent_rows_triton_(z, torch.arange(5), RowLoss(), ignored=None, want_grad=True)
    assert torch.equal(loss.isfinite(), torch.arange(5) != 2)
    assert torch.equal(z.isfinite().all(1), torch.arange(5) != 2)


def test_large_logits_and_row_offsets_do_not_overflow():
    z, target = draw(40, 300) * 1e4, torch.arange(40)
    exact = torch.nn.functional.cross_entropy(z.double(), target, reduction="none")
    expected, _, _ = row_bounds(z, target, 64)
    with watched(int32_limit=INT32_LIMIT):
        loss, _ = xent_rows_triton_(z, target, RowLoss(), ignored=None, want_grad=True)
    expected.check(loss, "loss")
    expected.check(exact.float(), "the definition")


def test_results_do_not_depend_on_the_order_of_programs():
    z, target = draw(9, 200).bfloat16(), torch.arange(9)

    def run():
        out = z.clone()
        return *xent_rows_triton_(out, target, RowLoss(), ignored=None, want_grad=True), out

    assert_same_bits_in_any_order(run)
