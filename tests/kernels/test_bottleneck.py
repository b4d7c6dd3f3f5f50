"""``bottleneck``: every output and gradient within its running-error bound, and what it keeps and refuses."""

import pytest
import torch
import torch.nn.functional as F
from bottleneck_cases import (
    BOUNDED,
    EVALUATION_ULPS,
    SCALE,
    TRAINED,
    apply,
    derivative,
    make,
    run,
)
from lora_cases import DTYPES, LAYOUTS, MIXED, draw, subsets

from lab.testing import Bound, assert_no_worse_than, kept_for_backward
from peftkit_kernels.ops.bottleneck import ACTIVATIONS, bottleneck


def bounds(leaves, dy, act="gelu", scale=SCALE):
    """The bound of each result, rounded where the torch schedule rounds."""
    x = leaves["x"]
    dtype, factors = x.dtype, leaves["down"].dtype
    h, grad = Bound.of(x.reshape(-1, x.shape[-1])), Bound.of(dy.reshape(-1, x.shape[-1]))
    down, up = (Bound.of(leaves[name]).round(dtype) for name in ("down", "up"))
    biased = leaves["bias_down"] is not None
    z = h @ down.T
    if biased:
        z = Bound.of(leaves["bias_down"]).round(dtype).addmm(h, down.T)
    z = z.round(dtype)
    first, second, size = BOUNDED[act]
    a = z.map(ACTIVATIONS[act], first, EVALUATION_ULPS, size).round(dtype)
    scaled = (a * scale).round(dtype)
    added = scaled @ up.T
    if biased:
        shift = (Bound.of(leaves["bias_up"]).round(dtype) * scale).round(dtype)
        added = shift.addmm(scaled, up.T)
    slope = z.map(lambda v: derivative(v, act), second, EVALUATION_ULPS, size)
    da = ((grad @ up).round(dtype) * scale).round(dtype)
    dz = (da * slope).round(dtype)
    onto, dx = h, (dz @ down).round(dtype)
    if "base" in leaves:
        onto = Bound.of(leaves["base"].reshape(-1, x.shape[-1]))
    else:
        dx = (dx + grad).round(dtype)
    results = {
        "y": (added.round(dtype) + onto).round(dtype).reshape(*x.shape),
        "x": dx.reshape(*x.shape),
        "base": Bound.of(dy),
        "down": (dz.T @ h).round(factors),
        "up": ((grad.T @ a).round(factors) * scale).round(factors),
    }
    if biased:
        results["bias_down"] = dz.sum(0).round(factors)
        results["bias_up"] = (grad.sum(0).round(factors) * scale).round(factors)
    return results


def check(leaves, layout="contiguous", act="gelu", scale=SCALE, **options):
    x = leaves["x"]
    dy = draw(tuple(x.shape), x.dtype, torch.Generator().manual_seed(1), layout)
    results = run(leaves, dy, act=act, scale=scale, **options)
    expected = bounds(leaves, dy, act, scale)
    for name, value in results.items():
        assert value.dtype == (leaves["down"].dtype if name[0] in "du" or "_" in name else x.dtype)
        expected[name].check(value, name)
    return set(results)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, base, act):
    leaves = make(bias, base, x=(17, 33), dtype=dtype, factors=factors)
    assert check(leaves, act=act) == {"y"} | {n for n, leaf in leaves.items() if leaf is not None}


@pytest.mark.parametrize("rank", [1, 16, 24, 64])
@pytest.mark.parametrize("rows", [0, 1, 3, 65, 300])
def test_any_number_of_rows_and_width_of_the_bottleneck(rows, rank):
    for dtype, factors in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        assert len(check(make(x=(rows, 31), rank=rank, dtype=dtype, factors=factors))) == 6


@pytest.mark.parametrize("D", [1, 7, 64, 301])
def test_any_width(D):
    assert len(check(make(x=(17, D)))) == 6


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout, dy_layout):
    assert len(check(make(x=(2, 5, 33), layout=layout), dy_layout)) == 6


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_scale(scale):
    assert len(check(make(), scale=scale)) == 6


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    leaves = make(trained=trained)
    assert check(leaves) == {"y", *trained}
    with kept_for_backward(*leaves.values()) as kept:
        y = apply({**leaves, "x": leaves["x"] * 1.0})
    assert y.requires_grad
    M, D, R = 15, 33, 4
    z = set(trained) != {"bias_up"}
    assert kept.total_bytes == 4 * (M * D * ("down" in trained) + M * R * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_autograd(dtype):
    leaves = make(x=(65, 33), dtype=dtype)
    dy = draw((65, 33), dtype, torch.Generator().manual_seed(1))
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    truth = run(wide, dy.double(), backend="reference")
    plain, actual = run(leaves, dy, backend="reference"), run(leaves, dy)
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], truth[name], name)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_reference_is_the_formula(act):
    leaves = make(x=(3, 5), rank=2, dtype=torch.float64)
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    function = functions.get(act, ACTIVATIONS[act])
    z = leaves["x"] @ leaves["down"].T + leaves["bias_down"]
    y = leaves["x"] + SCALE * (function(z) @ leaves["up"].T + leaves["bias_up"])
    actual = apply(leaves, act, backend="reference")
    torch.testing.assert_close(actual, y, rtol=1e-13, atol=1e-14)

    def op(*parts):
        return bottleneck(*parts, SCALE, act, backend="reference")

    assert torch.autograd.gradcheck(op, tuple(leaves[name] for name in TRAINED))


def test_a_new_adapter_changes_nothing():
    leaves = make()
    with torch.no_grad():
        leaves["up"].zero_()
        leaves["bias_up"].zero_()
    assert torch.equal(apply(leaves), leaves["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 32)}, r"down \(4, 33\) and up \(33, 4\) do not fit h \(3, 32\)"),
        ({"x": torch.zeros(())}, r"do not fit h \(\)"),
        ({"down": torch.zeros(5, 33)}, r"down \(5, 33\) and up \(33, 4\)"),
        ({"bias_down": torch.zeros(5)}, r"down_bias has shape \(5,\); it must be \[4\]"),
        ({"bias_up": torch.zeros(1)}, r"up_bias has shape \(1,\); it must be \[33\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        apply(make() | change)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"act='swish' is unknown; use one of relu, gelu"):
        apply(make(), "swish")
