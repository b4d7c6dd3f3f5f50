"""``grouped_lora`` and its plan: every row gets its own adapter's update, and nobody else's anything."""

import pytest
import torch
from grouped_cases import IDS, NAMES, SCALE, E, K, N, bounds, make, output_grad
from lora_cases import DTYPES, LAYOUTS, MIXED, gradients, subsets

from lab.testing import Made, kept_for_backward
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.grouped_lora import grouped_lora, plan_groups
from peftkit_kernels.ops.grouped_lora.torch_passes import tiles_of
from peftkit_kernels.ops.lora_linear import lora_linear


def run(leaves, ids, dy=None, backend="auto", block=16):
    plan = plan_groups(ids, E, block=block)
    out = grouped_lora(
        *(leaves[name] for name in NAMES), SCALE.to(ids.device), plan, backend=backend
    )
    dy = output_grad(leaves) if dy is None else dy
    results = {"out": out.detach()}
    return results | (gradients(out, dy, leaves) if out.requires_grad else {})


def check(leaves, ids, block=16):
    dy = output_grad(leaves)
    actual, expected = run(leaves, ids, dy, block=block), bounds(leaves, ids, dy, block)
    for name, value in actual.items():
        expected[name].check(value, name)
        assert value.dtype == leaves.get(name, leaves["x"]).dtype
    return set(actual)


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, ids):
    assert check(make(dtype=dtype, factors=factors), IDS[ids](37)) == {"out", *NAMES}


@pytest.mark.parametrize("rank", [1, 16, 24])
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("M", [1, 3, 16, 17, 65])
def test_any_number_of_rows_and_rank(M, block, rank):
    check(make(M, rank=rank), IDS["mixed"](M), block=block)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_rows(backend):
    results = run(make(0), torch.empty(0, dtype=torch.int64), backend=backend)
    assert results["out"].shape == (0, N)
    assert not results["A"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    check(make(layout=layout), IDS["mixed"](37))


@pytest.mark.parametrize("trained", subsets(NAMES), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    ids = IDS["mixed"](37)
    every, actual = run(make(), ids), run(make(trained=trained), ids)
    assert actual.keys() == {"out", *trained}
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    leaves = make(trained=trained)
    plan = plan_groups(ids, E)
    with kept_for_backward(*leaves.values(), SCALE, *tiles_of(plan)) as kept:
        out = grouped_lora(leaves["y"], leaves["x"] * 1, leaves["A"], leaves["B"], SCALE, plan)
    assert out.requires_grad
    expected = 37 * K * ("A" in trained) + plan.tiles.shape[0] * 16 * 4 * ("B" in trained)
    assert kept.total_bytes == 4 * expected


def test_one_adapter_is_lora_linear():
    leaves = make()
    for e in (0, 3, 4):
        lora = LoRA(leaves["A"][e], leaves["B"][e], float(SCALE[e]))
        expected = leaves["y"] + lora_linear(leaves["x"], torch.zeros(N, K), None, lora)
        torch.testing.assert_close(run(leaves, torch.full((37,), e))["out"], expected)


def test_leading_axes():
    leaves, ids = make(24), IDS["mixed"](24)
    flat = run(leaves, ids)["out"]
    plan = plan_groups(ids, E)
    y, x = (leaves[name].reshape(2, 3, 4, -1) for name in "yx")
    out = grouped_lora(y, x, leaves["A"], leaves["B"], SCALE, plan)
    assert torch.equal(out, flat.view(2, 3, 4, N))
    assert not out._is_view()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_bad_row_or_adapter_spoils_itself_only(backend):
    leaves = make()
    ids = IDS["every row another"](37)
    ids[7] = -1
    with torch.no_grad():
        leaves["x"][7] = torch.nan  # has no adapter
        leaves["x"][0, 1] = torch.inf  # adapter 0
        leaves["B"][2, 3, 1] = torch.nan
    results = run(leaves, ids, backend=backend)
    good = (ids != 2) & (torch.arange(37) != 0)
    assert torch.equal(results["out"].isfinite().all(1), good)
    assert torch.equal(results["out"][7], leaves["y"][7])
    assert torch.equal(results["x"].isfinite().all(1), ids != 2)
    assert results["A"].isfinite().flatten(1).all(1).tolist() == [False, True, False, True, True]
    assert results["B"].isfinite().flatten(1).all(1).tolist() == [False, True, True, True, True]


def test_an_adapter_without_rows_gets_nothing_from_a_bad_row():
    leaves, ids = make(5), torch.tensor([1, 2, 1, 4, 2])
    with torch.no_grad():
        leaves["x"][0] = torch.inf  # first in the order, where tiles that are not needed look
    results = run(leaves, ids)
    for e in (0, 3):
        assert not results["A"][e].any()
        assert not results["B"][e].any()
    assert results["A"][2].isfinite().all()
    assert not results["A"][1].isfinite().all()


def test_gradients_of_the_reference():
    leaves = make(5, torch.float64, rank=2)
    ids = torch.tensor([4, -1, 0, 4, 2])

    def op(*tensors):
        return grouped_lora(*tensors, SCALE, plan_groups(ids, E), backend="reference")

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))
    out = op(*leaves.values())
    for m, e in enumerate(ids.tolist()):
        expected = leaves["y"][m]
        if e >= 0:
            product = leaves["B"][e] @ (leaves["A"][e] @ leaves["x"][m])
            expected = expected + SCALE[e] * product
        torch.testing.assert_close(out[m], expected)


def test_as_many_operations_whatever_the_number_of_adapters():
    counts = []
    for adapters in (2, 40):
        M, ids = 64, torch.arange(64) % adapters
        x, y = torch.randn(M, 256, requires_grad=True), torch.randn(M, 256)
        A, B = torch.randn(adapters, 8, 256), torch.randn(adapters, 256, 8)
        plan = plan_groups(ids, adapters)
        A, B = A.requires_grad_(), B.requires_grad_()
        with Made() as made:
            grouped_lora(y, x, A, B, torch.ones(adapters), plan).sum().backward()
        counts.append(made.calls)
        # no factors picked for each row
        assert made.largest_bytes <= 4 * plan.rows.numel() * 256 < 4 * M * 8 * 256 * 3
    assert counts[0] == counts[1]


def test_modes_repetition_and_refusals():
    leaves, ids = make(), IDS["mixed"](37)
    first, again = run(leaves, ids), run(leaves, ids)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.inference_mode():
        assert torch.equal(run(leaves, ids)["out"], first["out"])
    out = grouped_lora(*leaves.values(), SCALE, plan_groups(ids, E))
    (dx,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_lora is once_differentiable"):
        dx.sum().backward()


def test_compiled_without_graph_break():
    leaves, ids = make(dtype=torch.float64), IDS["mixed"](37)
    plan = plan_groups(ids, E)

    def op(*tensors):
        return grouped_lora(*tensors, SCALE, plan)

    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves.values()), op(*leaves.values()))


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("M", [0, 1, 17, 65])
def test_plans_cover_every_row_once(M, block, ids):
    ids = IDS[ids](M)
    plan = plan_groups(ids.int(), E, block=block)
    assert plan.tiles.shape == (-(-M // block) + min(M, E), 3)
    seen = []
    for (adapter, first, count), rows, filled in zip(
        plan.tiles.tolist(), plan.rows, plan.filled, strict=True
    ):
        own = plan.order[first : first + count]
        assert filled.tolist() == [j < count for j in range(block)]
        assert (adapter == -1) == (count == 0)
        if count:
            assert torch.equal(rows[:count], own)
            assert (rows[count:] == own[0]).all()
            assert (ids[own] == adapter).all()
            assert own.diff().gt(0).all()
            seen += own.tolist()
    assert sorted(seen) == (ids >= 0).nonzero().view(-1).tolist()
    assert plan.adapted == len(seen)
    for e in range(E):
        own = plan.segments[plan.first_segment[e] : plan.first_segment[e + 1]]
        runs = [plan.order[first : first + count] for _, first, count in own.tolist()]
        assert (own[:, 0] == e).all()
        assert torch.equal(
            torch.cat([torch.empty(0, dtype=torch.int64), *runs]), (ids == e).nonzero().view(-1)
        )
    unneeded = plan.segments[plan.first_segment[E] :]
    assert (unneeded == torch.tensor([-1, 0, 0])).all()
    places = plan.place[ids >= 0]
    assert torch.equal(plan.rows.view(-1)[places], (ids >= 0).nonzero().view(-1))
    assert plan.filled.view(-1)[places].all()


@pytest.mark.parametrize(
    ("ids", "adapters", "message"),
    [
        (torch.zeros(3, 2).long(), 4, r"ids is torch.int64 \(3, 2\); it must be integers \[M\]"),
        (torch.zeros(3), 4, r"ids is torch.float32"),
        (
            torch.tensor([0, 4]),
            4,
            r"ids are from 0 to 4; with adapters=4 they must be from -1 to 3",
        ),
        (torch.tensor([-2, 0]), 4, r"ids are from -2 to 0"),
        (torch.tensor([0]), 0, r"adapters=0 and block=16 must be at least 1"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, adapters, message):
    with pytest.raises(ValueError, match=message):
        plan_groups(ids, adapters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 4, K)}, r"A \(4, 4, 33\) .* do not fit a plan for 5 adapters"),
        ({"B": torch.zeros(E, N, 3)}, r"B \(5, 29, 3\)"),
        ({"B": torch.zeros(E, N, 4).double()}, r"A is torch.float32 and B is torch.float64"),
        ({"x": torch.zeros(37, 32)}, r"x \(37, 32\) and y \(37, 29\) do not fit"),
        ({"y": torch.zeros(37, 28)}, r"y \(37, 28\) do not fit"),
        ({"y": torch.zeros(37, N).half()}, r"y is torch.float16 and x is torch.float32"),
        ({"scale": torch.zeros(4)}, r"scale has shape \(4,\)"),
        ({"scale": torch.zeros(E, requires_grad=True)}, r"requires_grad=True; it must be \[5\]"),
        (
            {"plan": plan_groups(torch.zeros(36).long(), E)},
            r"x \(37, 33\) does not have the 36 rows",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    plan = plan_groups(torch.zeros(37).long(), E)
    arguments = make() | {"scale": SCALE, "plan": plan} | change
    with pytest.raises(ValueError, match=message):
        grouped_lora(**arguments)
