"""``lora_linear`` by Triton: every output and gradient within its bound, bytes, and what it keeps."""

import lora_cases
import pytest
import torch
from lora_cases import LAYOUTS, MIXED, Shape, gradients, subsets
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    watched,
)
from triton_linear import Linear, output_grad

from lab.eager import EagerTraffic
from lab.steps import step
from lab.testing import kept_for_backward
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.ops.lora_linear import lora_linear, triton_passes
from peftkit_kernels.ops.lora_linear import schedule as steps

N = 29
TRAINED = ("x", "bias", "A", "B")


@pytest.fixture(params=["fused", "addmm"])
def schedule(request, monkeypatch):
    """Both schedules, whatever would be chosen."""
    monkeypatch.setattr(triton_passes, "fuses_gemm", lambda *a, **k: request.param == "fused")
    return request.param


def make(N=N, **options):
    case = Shape(**options)
    return case.input(), case.projection(N, case.x[-1])


def run(x, part, dy):
    y = lora_linear(x, part.weight, part.bias, part.lora, backend="triton")
    results = {"y": y.detach()}
    if y.requires_grad:
        results |= gradients(y, dy, {"x": x, **part.tensors()})
    return results


def check(x, part, schedule, dy_layout="contiguous", **watch):
    """Run one case, watched, and compare all of it; returns the names compared and the launches."""
    dy = output_grad(x, part, dy_layout)
    with watched(**watch) as traffic:
        results = run(x, part, dy)
    linear = Linear(x, part, schedule)
    expected = {"y": linear.forward(), **linear.backward(dy)}
    for name, value in results.items():
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return set(results), traffic


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, p, schedule):
    x, part = make(x=(17, 33), dtype=dtype, factors=factors, bias=bias, p=p)
    names, _ = check(x, part, schedule)
    assert names == {"y", "x", "A", "B"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 24, 64, 200])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 65])
def test_any_number_of_rows_and_rank(rows, rank, schedule):
    names, _ = check(*make(x=(rows, 31), rank=rank, dtype=torch.bfloat16, p=0.1), schedule)
    assert len(names) == 5


@pytest.mark.parametrize(("K", "width"), [(1, 1), (7, 130), (257, 3), (64, 64)])
def test_any_width(K, width, schedule):
    names, _ = check(*make(x=(17, K), N=width, dtype=torch.float16, p=0.1), schedule)
    assert len(names) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 3, 4, 33)], ids=len)
def test_strided_inputs_and_gradients(layout, shape, schedule):
    for x_layout, dy_layout in ((layout, "contiguous"), ("contiguous", layout)):
        x, part = make(x=shape, dtype=torch.bfloat16, layout=x_layout)
        names, _ = check(x, part, schedule, dy_layout)
        assert len(names) == 5


@pytest.mark.parametrize("layout", ["transposed", "wide_rows"])
def test_strided_weight(layout, schedule):
    x, part = make(x=(17, 64), weight_layout=layout, dtype=torch.bfloat16)
    assert len(check(x, part, schedule)[0]) == 5


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3])
def test_scale(scale, schedule):
    x, part = make(scale=scale)
    assert len(check(x, part, schedule)[0]) == 5
    results = run(x, part, output_grad(x, part))
    assert bool(results["A"].any()) == bool(results["B"].any()) == (scale != 0.0)


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    for p in (0.0, 0.1):
        x, part = make(trained=trained, p=p)
        dy = output_grad(x, part)
        with kept_for_backward(*part.tensors().values()) as kept:
            y = lora_linear(x, part.weight, part.bias, part.lora, backend="triton")
        s_bytes = y[..., 0].numel() * part.lora.A.shape[0] * 4
        assert kept.total_bytes == x.nbytes * ("A" in trained) + s_bytes * ("B" in trained)
        every = run(*make(p=p), dy)
        results = run(x, part, dy)
        assert results.keys() == {"y", *trained}
        for name, value in results.items():
            # dB and ds come from one pass over dy where both are needed, and either from one with other tiles where it is not
            other = {"B": {"x", "A"}, "x": {"B"}, "A": {"B"}}.get(name)
            if other is None or other & set(trained):
                assert torch.equal(value, every[name]), name
        check(x, part, "addmm")


def test_offsets_of_rows_do_not_overflow(schedule):
    x, part = make(x=(70, 72), N=88, rank=8, dtype=torch.bfloat16, p=0.1)
    assert len(check(x, part, schedule, int32_limit=INT32_LIMIT)[0]) == 5


def test_results_do_not_depend_on_the_order_of_programs(schedule):
    x, part = make(x=(130, 72), N=150, rank=8, dtype=torch.bfloat16, p=0.1)
    dy = output_grad(x, part)
    assert_same_bits_in_any_order(lambda: tuple(run(x, part, dy).values()))


def big(dtype=torch.bfloat16, p=0.0, bias=False):
    """Rows of 32-byte multiples, more than one tile of everything."""
    return make(x=(300, 256), N=576, rank=16, dtype=dtype, p=p, bias=bias)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_are_those_of_the_formula(p, schedule):
    """Kernels README: 3x + 2W + 3y + 2dy + 3dx, or with one kernel 3x + 2W + y + 2dy + dx, factors and partial sums."""
    x, part = big(p=p)
    dy = output_grad(x, part)
    factors, call = (
        (part.lora.A, part.lora.B),
        steps.Linears(x, [steps.Linear(part.weight, None, part.lora)]),
    )
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is traffic of its own
    with watched() as traffic, EagerTraffic() as torch_ops, torch.no_grad():
        made = step(steps, call).made
    M, K, N, R = 300, 256, 576, 16
    W, s_bytes, y, dx = part.weight.nbytes, made[0].nbytes, dy.nbytes, x.nbytes
    streams = 3 * x.nbytes + 2 * W + 2 * dy.nbytes
    streams += y + dx if schedule == "fused" else 3 * y + 3 * dx
    # s is written, and read by the projection and for dB; ds the same; each factor is read twice, each gradient written
    small = 6 * s_bytes + 3 * sum(factor.nbytes for factor in factors)
    # two chunks of rows, and two blocks of dy's columns: float32, written and read
    partials = 2 * 4 * R * (2 * N + 2 * M + 2 * K)
    assert traffic.unique_bytes + torch_ops.unique_bytes == streams + small + partials
    for launch in traffic.launches:
        if launch.kernel in ("shrink_kernel", "tall_kernel"):
            read = launch.arguments["x_ptr"].load
            assert read.requested_bytes == read.unique_bytes == read.sector_bytes


def eager(x, part):
    """PEFT's layer, with the dropout a GPU runs as one kernel."""
    lora, y = part.lora, torch.nn.functional.linear(x, part.weight)
    d = torch.native_dropout(x, lora.p, True)[0] if lora.p else x
    update = torch.nn.functional.linear(torch.nn.functional.linear(d, lora.A), lora.B)
    return y + update * lora.scale


@pytest.mark.parametrize(
    ("schedule", "p", "ratio"),
    [("addmm", 0.0, 0.59), ("addmm", 0.1, 0.48), ("fused", 0.0, 0.40), ("fused", 0.1, 0.32)],
    indirect=["schedule"],
)
def test_bytes_against_eager_at_training_sizes(schedule, p, ratio):
    """At M 8192, K = N = 4096, R 16: the passes by the formula that the test above holds them to, eager counted on meta."""
    M, K, N, R = 8192, 4096, 4096, 16

    def meta(*shape, grad=True):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=grad)

    x, weight = meta(M, K), meta(N, K, grad=False)
    part = lora_cases.Projection(weight, None, lora_cases.LoRA(meta(R, K), meta(N, R), 2.0, p, 0))
    with EagerTraffic() as plain:
        eager(x, part).backward(meta(M, N, grad=False))
    size = 2 * M * K
    streams = (3 + 1 + 2 + 1 if schedule == "fused" else 3 + 3 + 2 + 3) * size + 4 * N * K
    partials = 2 * 4 * R * M * N * (1 / 512 + 1 / 1024) + 2 * 4 * R * K * M / 1024
    assert (streams + partials) / plain.unique_bytes <= ratio + 0.005
    assert block_r(R) == R


def test_opcheck():
    x, part = make(x=(3, 33), p=0.1, dtype=torch.bfloat16, factors=torch.float32)
    opcheck(steps, steps.Linears(x, [steps.Linear(part.weight, part.bias, part.lora)]))
