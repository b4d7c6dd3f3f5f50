"""``bottleneck`` by Triton: every output and gradient within its bound, one read of h and one write of y, what it keeps."""

import pytest
import torch
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
from lora_cases import LAYOUTS, MIXED, draw, subsets
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    scaled,
    watched,
)

from lab.eager import EagerTraffic
from lab.steps import step
from lab.testing import Bound, kept_for_backward
from peftkit_kernels.core.launch import Target
from peftkit_kernels.ops.bottleneck import ACTIVATIONS, schedule
from peftkit_kernels.ops.bottleneck.config import MAX_BOTTLENECK, BottleneckConfig


def bounds(leaves, dy, act, scale):
    """The bound of each result of ``run``: one rounding at each store, and the activation's own operand."""
    x = leaves["x"]
    dtype, factors = x.dtype, leaves["down"].dtype
    h, grad = (Bound.of(t.detach().reshape(-1, x.shape[-1])) for t in (x, dy))
    down, up = (Bound.of(leaves[name].to(dtype)) for name in ("down", "up"))
    biased = leaves["bias_down"] is not None
    z = h @ down.T
    if biased:
        z = z + Bound.of(leaves["bias_down"])
    z = z.round(dtype)
    first, second, size = BOUNDED[act]
    a = z.map(ACTIVATIONS[act], first, EVALUATION_ULPS, size).round(dtype)
    added = a @ up.T
    if biased:
        added = added + Bound.of(leaves["bias_up"])
    slope = z.map(lambda v: derivative(v, act), second, EVALUATION_ULPS, size)
    dz = (scaled(grad @ up, scale) * slope).round(dtype)
    onto, dx = h, dz @ down
    if "base" in leaves:
        onto = Bound.of(leaves["base"].detach().reshape(-1, x.shape[-1]))
    else:
        dx = dx + grad
    results = {
        "y": (scaled(added, scale) + onto).round(dtype).reshape(*x.shape),
        "x": dx.round(dtype).reshape(*x.shape),
        "base": Bound.of(dy),
        "down": (dz.T @ h).round(factors),
        "up": scaled(grad.T @ a, scale).round(factors),
    }
    if biased:
        results["bias_down"] = dz.sum(0).round(factors)
        results["bias_up"] = scaled(grad.sum(0), scale).round(factors)
    return results


def check(leaves, layout="contiguous", act="gelu", scale=SCALE, **watch):
    """Run one case, watched, and compare all of it; returns the names compared and the launches."""
    x = leaves["x"]
    dy = draw(tuple(x.shape), x.dtype, torch.Generator().manual_seed(1), layout)
    with watched(**watch) as traffic:
        results = run(leaves, dy, act=act, scale=scale, backend="triton")
    expected = bounds(leaves, dy, act, scale)
    for name, value in results.items():
        assert value.dtype == (leaves["down"].dtype if name[0] in "du" or "_" in name else x.dtype)
        expected[name].check(value, name)
    return set(results), traffic.launches


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, act):
    for bias, base in ((True, False), (False, True)):
        leaves = make(bias, base, x=(17, 33), dtype=dtype, factors=factors)
        names, _ = check(leaves, act=act)
        assert names == {"y"} | {name for name, leaf in leaves.items() if leaf is not None}


@pytest.mark.parametrize("rank", [1, 16, 24, 64, 150, 256])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_any_number_of_rows_and_width_of_the_bottleneck(rows, rank):
    leaves = make(x=(rows, 31), rank=rank, dtype=torch.bfloat16, factors=torch.float32)
    assert len(check(leaves)[0]) == 6


@pytest.mark.parametrize("D", [1, 7, 64, 301])
def test_any_width(D):
    assert len(check(make(x=(17, D), dtype=torch.float16))[0]) == 6


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout, dy_layout):
    leaves = make(base=True, x=(2, 5, 33), layout=layout, dtype=torch.bfloat16)
    assert len(check(leaves, dy_layout)[0]) == 7


def test_strided_factors():
    leaves = make(x=(17, 33))
    for name in ("down", "up"):
        leaves[name] = leaves[name].detach().t().contiguous().t().requires_grad_()
    assert len(check(leaves)[0]) == 6


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_scale(scale):
    assert len(check(make(), scale=scale)[0]) == 6


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    leaves = make(trained=trained)
    assert check(leaves)[0] == {"y", *trained}
    with kept_for_backward(*leaves.values()) as kept:
        y = apply({**leaves, "x": leaves["x"] * 1.0}, backend="triton")
    assert y.requires_grad
    M, D, R = 15, 33, 4
    z = set(trained) != {"bias_up"}
    assert kept.total_bytes == 4 * (M * D * ("down" in trained) + M * R * z)


def test_offsets_of_rows_do_not_overflow():
    leaves = make(base=True, x=(70, 88), rank=8, dtype=torch.bfloat16)
    assert len(check(leaves, int32_limit=INT32_LIMIT)[0]) == 7


def test_results_do_not_depend_on_the_order_of_programs():
    leaves = make(x=(130, 72), rank=8, dtype=torch.bfloat16)
    dy = draw((130, 72), torch.bfloat16, torch.Generator().manual_seed(1))
    assert_same_bits_in_any_order(lambda: tuple(run(leaves, dy, backend="triton").values()))


def test_a_new_adapter_changes_nothing():
    leaves = make(dtype=torch.bfloat16)
    with torch.no_grad():
        leaves["up"].zero_()
        leaves["bias_up"].zero_()
    assert torch.equal(apply(leaves, backend="triton"), leaves["x"])


@pytest.mark.parametrize("has_base", [False, True], ids=["", "base"])
@pytest.mark.parametrize("rank", [16, 256])
def test_bytes_are_those_of_the_formula(rank, has_base):
    """Operation's README: h, y and a base forward; 2 dy, dh and h backward, the narrow tensors and the factors."""
    M, D = 40, 64
    leaves = make(False, has_base, x=(M, D), rank=rank, dtype=torch.bfloat16)
    h, down, _, up, _, *base = (None if t is None else t.detach() for t in leaves.values())
    (base,) = base or (None,)
    call = schedule.Adapter(h, down, None, up, None, base, SCALE, "gelu")
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is traffic of its own
    with watched() as traffic, EagerTraffic() as torch_ops:
        z = step(schedule, call).made
    forward, backward = traffic.launches[:2]
    factors = down.nbytes + up.nbytes
    assert forward.total() == (2 + has_base) * h.nbytes + z.nbytes + factors
    assert backward.total() == 2 * h.nbytes + 3 * z.nbytes + factors
    # without a base the second read is of rows that the program has just had
    reads = 1 if has_base else 2
    read = forward.arguments["h_ptr"].load
    assert read.requested_bytes == read.sector_bytes == reads * read.unique_bytes
    written = forward.arguments["y_ptr"].store
    assert written.requested_bytes == written.unique_bytes == written.sector_bytes == h.nbytes
    passes = traffic.launches[2:]
    parts = -(-rank // 128)
    assert [launch.kernel for launch in passes] == ["tall_kernel"] * 2 * parts
    assert torch_ops.unique_bytes == 0
    # h and dy once more for each 128 of the bottleneck, a and dz, and the gradients
    assert sum(launch.total() for launch in passes) == 2 * parts * h.nbytes + 2 * z.nbytes + factors


def test_a_bottleneck_too_wide_is_refused():
    leaves = make(rank=MAX_BOTTLENECK + 1)
    with pytest.raises(ValueError, match=r"the bottleneck is 257 wide; .* up to 256; use backend="):
        apply(leaves, backend="triton")
    assert apply(leaves).shape == leaves["x"].shape


@pytest.mark.parametrize("M", [1, 300, 2000, 8192])
def test_few_rows_make_smaller_blocks(M):
    c = BottleneckConfig.choose(M, 64, itemsize=2, aligned=True, target=Target("cuda:80", 108))
    programs = -(-M // c.block_m)
    assert programs >= 81 or c.block_m == 16
    assert c.block_m == 64 or -(-M // (2 * c.block_m)) < 81


def test_opcheck():
    leaves = make(x=(3, 33), dtype=torch.bfloat16, factors=torch.float32)
    tensors = [leaves[name] for name in TRAINED]
    for base in (None, leaves["x"].detach().clone().requires_grad_()):
        opcheck(schedule, schedule.Adapter(*tensors, base, SCALE, "gelu"))
