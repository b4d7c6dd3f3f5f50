"""``grouped_lora`` by Triton: every output and gradient within its bound, bytes, and that nobody gets anybody else's rows."""

import pytest
import torch
from grouped_cases import IDS, NAMES, SCALE, E, K, N, bounds, make, output_grad
from lora_cases import LAYOUTS, MIXED, gradients, subsets
from lora_cases import draw as draw_like
from torch.utils.checkpoint import checkpoint
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, opcheck, watched

from lab.steps import step
from lab.testing import kept_for_backward
from peftkit_kernels.core.launch import INTERPRETED, recording
from peftkit_kernels.core.structure import build, flatten
from peftkit_kernels.ops.grouped_lora import grouped_lora, passes, plan_groups, schedule
from peftkit_kernels.ops.grouped_lora import plan as plan_module
from peftkit_kernels.ops.grouped_lora.config import GroupedShrinkConfig
from peftkit_kernels.ops.grouped_lora.passes import table_of


def make16(M=37, dtype=torch.bfloat16, **options):
    return make(M, dtype, **options)


def run(leaves, plan, dy):
    out = grouped_lora(*(leaves[name] for name in NAMES), SCALE, plan, backend="triton")
    results = {"out": out.detach()}
    return results | (gradients(out, dy, leaves) if out.requires_grad else {})


def check(leaves, ids, block=16, **watch):
    """All of one case within its bounds; returns the names compared and the launches."""
    plan, dy = plan_groups(ids, E, block=block), output_grad(leaves)
    with watched(**watch) as traffic:
        results = run(leaves, plan, dy)
    expected = bounds(leaves, ids, dy)
    for name, value in results.items():
        expected[name].check(value, name)
        assert value.dtype == leaves.get(name, leaves["x"]).dtype
    untouched = ids < 0
    assert torch.equal(results["out"][untouched], leaves["y"][untouched])
    if "x" in results:
        assert not results["x"][untouched].any()
    return set(results), traffic


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, ids):
    names, _ = check(make16(dtype=dtype, factors=factors), IDS[ids](37))
    assert names == {"out", *NAMES}


@pytest.mark.parametrize(
    ("M", "block", "rank"),
    [(1, 16, 1), (3, 1, 4), (16, 64, 16), (65, 32, 24), (64, 16, 64), (17, 64, 128)],
)
def test_any_number_of_rows_and_rank(M, block, rank):
    assert len(check(make16(M, rank=rank), IDS["mixed"](M), block)[0]) == 5


@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 130), (257, 3)])
def test_any_width(width, out):
    assert len(check(make16(17, torch.float16, sizes=(width, out)), IDS["mixed"](17))[0]) == 5


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_and_offsets(layout):
    assert len(check(make16(layout=layout), IDS["mixed"](37))[0]) == 5


def test_partial_sums_of_every_pass(monkeypatch):
    """Several segments an adapter, and shares of K."""
    monkeypatch.setattr(plan_module, "segment_rows", lambda M: 16)
    monkeypatch.setattr(
        passes.GroupedShrinkConfig, "choose", lambda *a, **k: GroupedShrinkConfig(16, 3)
    )
    _, traffic = check(make16(90), IDS["in runs"](90))
    partial = traffic.launches[0].arguments["s_ptr"].store
    assert partial.requested_bytes == 90 * 4 * 4 * 3


@pytest.mark.parametrize("trained", subsets(NAMES), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    ids = IDS["mixed"](37)
    plan, leaves = plan_groups(ids, E), make16(trained=trained)
    dy = output_grad(leaves)
    every, actual = run(make16(), plan, dy), run(leaves, plan, dy)
    assert actual.keys() == {"out", *trained}
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    with kept_for_backward(*leaves.values(), SCALE, *table_of(plan)[:-1]) as kept:
        x = leaves["x"] * 1
        out = grouped_lora(leaves["y"], x, leaves["A"], leaves["B"], SCALE, plan, backend="triton")
    assert out.requires_grad
    assert kept.total_bytes == 2 * 37 * (K * ("A" in trained) + 4 * ("B" in trained))


def test_offsets_of_rows_do_not_overflow():
    assert len(check(make16(90, sizes=(72, 88)), IDS["mixed"](90), int32_limit=INT32_LIMIT)[0]) == 5


def test_results_do_not_depend_on_the_order_of_programs():
    leaves, plan = make16(40, sizes=(72, 150)), plan_groups(IDS["mixed"](40), E)
    dy = output_grad(leaves)
    assert_same_bits_in_any_order(lambda: tuple(run(leaves, plan, dy).values()))


def test_a_bad_row_or_adapter_spoils_itself_only():
    leaves, ids = make16(), IDS["every row another"](37)
    ids[7] = -1
    with torch.no_grad():
        leaves["x"][7] = torch.nan  # has no adapter
        leaves["x"][0, 1] = torch.inf  # adapter 0
        leaves["B"][2, 3, 1] = torch.nan
    results = run(leaves, plan_groups(ids, E), output_grad(leaves))
    good = (ids != 2) & (torch.arange(37) != 0)
    assert torch.equal(results["out"].isfinite().all(1), good)
    assert torch.equal(results["out"][7], leaves["y"][7])
    assert torch.equal(results["x"].isfinite().all(1), ids != 2)
    assert results["A"].isfinite().flatten(1).all(1).tolist() == [False, True, False, True, True]
    assert results["B"].isfinite().flatten(1).all(1).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("adapters", [5, 400])
@pytest.mark.parametrize("M", [32, 300], ids=["decoding", "training"])
def test_bytes_are_those_of_the_formula(M, adapters):
    """Forward: x of the rows with an adapter, s twice, factors of the adapters present, 2y; no more for 400 adapters than for 5."""
    K, N, R, dtype, size = 128, 192, 16, torch.bfloat16, 2
    present = torch.tensor([0, 3, 4])
    ids = present[torch.arange(M) % 3]
    ids[::8] = -1
    own = int((ids >= 0).sum())
    plan, generator = plan_groups(ids, adapters, block=64), torch.Generator().manual_seed(0)
    y, x = draw_like((M, N), dtype, generator), draw_like((M, K), dtype, generator)
    A = draw_like((adapters, R, K), dtype, generator)
    B = draw_like((adapters, N, R), dtype, generator)
    call = schedule.Grouped(x, y, A, B, torch.ones(adapters), table_of(plan))
    with watched() as traffic, torch.no_grad():
        schedule.forward(schedule.TritonPasses(), call)
    shrink, expand = traffic.launches
    streams = (own * K + 2 * own * R + 3 * R * (K + N) + 2 * M * N) * size
    # rows in their order, read by both passes, by the second those without an adapter too; tiles looked at by both; scales
    tables = 8 * (own + M) + 2 * 24 * plan.tiles.shape[0] + 4 * 3 + 8
    assert traffic.unique_bytes == streams + tables
    assert plan.tiles.shape[0] <= -(-M // 64) + min(M, adapters)
    for launch, name in ((shrink, "x_ptr"), (expand, "y_ptr")):
        read = launch.arguments[name].load
        assert read.requested_bytes == read.unique_bytes == read.sector_bytes


def arguments(trained=()):
    """Of the schedule; every row has an adapter, since ``s`` of others is memory as it was found."""
    plan = plan_groups(IDS["every row another"](9), E)
    y, x, A, B = make16(9, trained=trained).values()
    return schedule.Grouped(x, y, A, B, SCALE, table_of(plan))


def test_nothing_waits_for_the_device_and_nothing_grows_with_the_adapters():
    """On meta tensors there is nothing to wait for: reading a number raises."""
    counts = []
    for adapters in (2, 400):
        values = flatten(arguments())
        call = build(values.structure, [t.to("meta") for t in values.tensors])
        A, B = (t[:1].expand(adapters, -1, -1) for t in (call.A, call.B))
        with recording(INTERPRETED) as launches:
            step(schedule, call._replace(A=A, B=B))
        counts.append(len(launches))
    assert counts[0] == counts[1] == 8


def test_opcheck():
    opcheck(schedule, arguments(trained=NAMES))


def test_compiled_without_graph_break():
    leaves, plan = make16(9, factors=torch.float32), plan_groups(IDS["mixed"](9), E)
    dy = output_grad(leaves)
    expected = run(leaves, plan, dy)

    def op(*tensors):
        return grouped_lora(*tensors, SCALE, plan, backend="triton")

    torch.compiler.reset()
    out = torch.compile(op, backend="aot_eager", fullgraph=True)(*leaves.values())
    actual = {"out": out.detach()} | gradients(out, dy, leaves)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_modes_repetition_and_refusals():
    leaves, plan = make16(12), plan_groups(IDS["mixed"](12), E)
    dy = output_grad(leaves)
    expected, again = run(leaves, plan, dy), run(leaves, plan, dy)
    assert all(torch.equal(again[name], value) for name, value in expected.items())

    def op(y, x):
        return grouped_lora(y, x, leaves["A"], leaves["B"], SCALE, plan, backend="triton")

    for reentrant in (True, False):
        out = checkpoint(op, leaves["y"], leaves["x"], use_reentrant=reentrant)
        out.backward(dy)
        for name in NAMES:
            assert torch.equal(leaves[name].grad, expected[name]), name
            leaves[name].grad = None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(op(leaves["y"], leaves["x"]), expected["out"])
    parts = [leaves[name].reshape(2, 3, 2, -1) for name in "yx"]
    out = op(*parts)
    assert torch.equal(out, expected["out"].view(2, 3, 2, N))
    assert not out._is_view()
    (dx,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^grouped_lora is once_differentiable"):
        dx.sum().backward()
    out = op(leaves["y"], leaves["x"])
    with torch.no_grad():
        leaves["x"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dy)


def test_no_rows():
    leaves = make16(0)
    results = run(leaves, plan_groups(torch.empty(0, dtype=torch.int64), E), output_grad(leaves))
    assert results["out"].shape == (0, N)
    assert not results["A"].any()


@pytest.mark.parametrize(
    ("options", "block", "message"),
    [
        ({"dtype": torch.float64}, 16, "float64; the kernels compute in"),
        ({"rank": 129}, 16, "the rank is 129"),
        (
            {"rank": 17, "dtype": torch.float32},
            16,
            "the rank is 17 .* up to 16 in float32; use a 16-bit dtype",
        ),
        ({}, 65, r"the plan has tiles of 65 rows .* up to 64; use plan_groups\(block=64\)"),
    ],
)
def test_what_triton_cannot_compute_is_refused_by_name(options, block, message):
    leaves = make16(9, **options)
    plan = plan_groups(IDS["mixed"](9), E, block=block)
    with pytest.raises(ValueError, match=f"backend='triton'.*{message}"):
        grouped_lora(*leaves.values(), SCALE, plan, backend="triton")
