"""``lora_qkv`` by Triton: every output and gradient within its bound, bytes, groups of adapters, absent parts."""

from dataclasses import replace

import pytest
import torch
from lora_cases import MIXED, Shape, draw, gradients
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    scaled,
    watched,
)
from triton_linear import Linear, output_grad

from lab.eager import EagerTraffic
from lab.steps import step
from lab.testing import Bound, kept_for_backward
from peftkit_kernels.core.dropout import dropout_mask
from peftkit_kernels.low_rank.groups import group
from peftkit_kernels.ops.lora_linear import schedule as steps
from peftkit_kernels.ops.lora_linear import triton_passes
from peftkit_kernels.ops.lora_qkv import lora_qkv

WIDTHS = (40, 12, 7)


@pytest.fixture(params=["fused", "addmm"])
def schedule(request, monkeypatch):
    monkeypatch.setattr(triton_passes, "fuses_gemm", lambda *a, **k: request.param == "fused")
    return request.param


def make(widths=WIDTHS, **options):
    case = Shape(**options)
    x = case.input()
    return x, [case.projection(n, case.x[-1], str(i)) for i, n in enumerate(widths)]


def call(x, parts):
    columns = ([getattr(p, name) for p in parts] for name in ("weight", "bias", "lora"))
    return lora_qkv(x, *columns, backend="triton")


def leaves(x, parts):
    named = {"x": x}
    for i, part in enumerate(parts):
        named |= {f"{name}{i}": t for name, t in part.tensors().items()}
    return named


def run(x, parts, dys):
    ys = call(x, parts)
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return results | gradients(ys, dys, leaves(x, parts))


class Frozen:
    """A projection without an adapter."""

    def __init__(self, x, part):
        self.x, self.part, self.dtype = x.detach().reshape(-1, x.shape[-1]), part, x.dtype

    def forward(self):
        product = Bound.of(self.x) @ Bound.of(self.part.weight).T
        if self.part.bias is not None:
            product = Bound.of(self.part.bias).addmm(Bound.of(self.x), Bound.of(self.part.weight).T)
        return product.round(self.dtype)


def bounds(x, parts, dys, schedule):
    """The bound of each result of ``run``: dx starts from the updates, group by group, then the GEMMs add to it."""
    dtype = x.dtype
    linears = [Linear(x, p, schedule) if p.lora else Frozen(x, p) for p in parts]
    expected = {f"y{i}": linear.forward() for i, linear in enumerate(linears)}
    rows = [Bound.of(dy.reshape(-1, dy.shape[-1])) for dy in dys]
    ds = {}
    for i, (linear, dy) in enumerate(zip(linears, rows, strict=True)):
        if parts[i].lora:
            grads = linear.backward(dys[i])
            expected |= {f"A{i}": grads["A"], f"B{i}": grads["B"]}
            ds[i] = scaled(dy @ Bound.of(linear.B), parts[i].lora.scale).round(linear.wide)
        if parts[i].bias is not None:
            expected[f"bias{i}"] = dy.sum(0).round(dtype)
    dx = None
    for members in group([part.lora for part in parts]):
        lora = parts[members[0]].lora
        joint = Bound.cat([ds[i] for i in members], 1)
        A = Bound.cat([Bound.of(linears[i].A) for i in members], 0)
        update = scaled(linears[members[0]].narrow_product(joint, A), 1.0, lora.p)
        if lora.p:
            update = update * dropout_mask(*update.value.shape, lora.p, lora.seed)
        dx = (update if dx is None else dx + update).round(dtype)
    for dy, part in zip(rows, parts, strict=True):
        weight = Bound.of(part.weight)
        dx = (dy @ weight if dx is None else dx.addmm(dy, weight)).round(dtype)
    return expected | {"x": dx}


def check(x, parts, schedule, **watch):
    dys = [output_grad(x, part) for part in parts]
    with watched(**watch):
        results = run(x, parts, dys)
    expected = bounds(x, parts, dys, schedule)
    for name, value in results.items():
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return results


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, p, schedule):
    assert len(check(*make(x=(17, 33), dtype=dtype, factors=factors, p=p), schedule)) == 13


@pytest.mark.parametrize("rank", [1, 16, 24, 64, 130])
def test_ranks_that_fill_a_group_and_more(rank, schedule):
    x, parts = make(x=(9, 33), rank=rank, dtype=torch.bfloat16)
    assert len(group([part.lora for part in parts])) == {64: 2, 130: 3}.get(rank, 1)
    check(x, parts, schedule)


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_any_number_of_rows(rows, schedule):
    check(*make(x=(rows, 31), dtype=torch.float16, p=0.1), schedule)


@pytest.mark.parametrize("layout", ["wide_rows", "transposed", "expanded"])
def test_strided_input(layout, schedule):
    check(*make(x=(2, 6, 33), dtype=torch.bfloat16, layout=layout), schedule)


def test_one_mask_for_all_is_one_group(schedule):
    x, parts = make(x=(17, 33), dtype=torch.bfloat16, p=0.2)
    shared = [replace(part, lora=replace(part.lora, seed=11)) for part in parts]
    assert group([part.lora for part in parts]) == [[0], [1], [2]]
    assert group([part.lora for part in shared]) == [[0, 1, 2]]
    check(x, shared, schedule)


@pytest.mark.parametrize("absent", [(0,), (1, 2)], ids=str)
def test_projections_without_adapter_or_bias(absent, schedule):
    x, parts = make(x=(17, 33), dtype=torch.bfloat16, p=0.0)
    parts = [
        replace(part, lora=None if i in absent else part.lora, bias=None if i == 1 else part.bias)
        for i, part in enumerate(parts)
    ]
    results = check(x, parts, schedule)
    assert len(results) == 3 + 1 + 2 + 2 * (3 - len(absent))


def test_without_any_adapter_it_is_the_frozen_linears():
    x, parts = make(x=(17, 33))
    parts = [replace(part, lora=None) for part in parts]
    dys = [output_grad(x, part) for part in parts]
    results = run(x, parts, dys)
    expected = bounds(x, parts, dys, "addmm")
    assert len(results) == 7
    for name, value in results.items():
        expected[name].check(value, name)


@pytest.mark.parametrize("unused", [(0,), (1, 2)], ids=str)
def test_an_output_nobody_used_costs_no_gradient(unused):
    x, parts = make(x=(17, 33), p=0.0)
    dys = [output_grad(x, part) for part in parts]
    used = [i for i in range(3) if i not in unused]
    ys = call(x, parts)
    names = leaves(x, parts)
    grads = gradients([ys[i] for i in used], [dys[i] for i in used], names)
    zeros = [dy if i in used else torch.zeros_like(dy) for i, dy in enumerate(dys)]
    expected = gradients(call(x, parts), zeros, names)
    for name, grad in grads.items():
        if grad is None:
            assert not expected[name].any(), name
        else:
            assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize(
    "trained", [("x",), ("A0", "B0"), ("B2",), ("x", "A1", "bias0")], ids="-".join
)
def test_subsets_of_trained_tensors(trained):
    x, parts = make(trained=trained, p=0.1)
    dys = [output_grad(x, part) for part in parts]
    ys = call(x, parts)
    grads = gradients(
        [y for y in ys if y.requires_grad],
        [dy for dy, y in zip(dys, ys, strict=True) if y.requires_grad],
        leaves(x, parts),
    )
    assert grads.keys() == set(trained)
    every = run(*make(p=0.1), dys)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, every[name], rtol=1e-5, atol=1e-5)


def test_keeps_the_input_once():
    x, parts = make(x=(17, 33), p=0.1)
    weights = [t for part in parts for t in part.tensors().values()]
    with kept_for_backward(*weights) as kept:
        ys = call(x, parts)
    assert ys[0].requires_grad
    assert kept.total_bytes == 4 * (17 * 33 + 3 * 17 * 4)


def test_offsets_of_rows_do_not_overflow(schedule):
    x, parts = make(widths=(88, 40, 40), x=(70, 72), rank=8, dtype=torch.bfloat16, p=0.1)
    check(x, parts, schedule, int32_limit=INT32_LIMIT)


def test_results_do_not_depend_on_the_order_of_programs():
    x, parts = make(widths=(150, 40, 40), x=(130, 72), rank=8, dtype=torch.bfloat16, p=0.1)
    dys = [output_grad(x, part) for part in parts]
    assert_same_bits_in_any_order(lambda: tuple(run(x, parts, dys).values()))


def test_passes_over_the_input_are_one_shrink_one_gemm_each_and_one_da_pass():
    x, parts = make(widths=(64, 32, 32), x=(40, 64), rank=4, dtype=torch.float32, bias=False)
    call = steps.Linears(x, [steps.Linear(part.weight, None, part.lora) for part in parts])
    torch.use_deterministic_algorithms(False)
    with watched() as traffic, EagerTraffic() as torch_ops, torch.no_grad():
        step(steps, call)
    M, K, R = 40, 64, 4
    N = 64 + 32 + 32
    gemms = [op for op in torch_ops.ops if op.flops]
    assert len(gemms) == 6
    x_reads = [
        launch
        for launch in traffic.launches
        if launch.arguments.get("x_ptr") and launch.arguments["x_ptr"].start == x.data_ptr()
    ]
    assert [launch.kernel for launch in x_reads] == ["shrink_kernel", "tall_kernel"]
    # 1.6 x the three frozen projections is the bound at R 16 and real sizes; this is the formula behind it
    streams = 4 * ((1 + 1 + 3) * M * K + 2 * N * K + 3 * M * N + 2 * M * N + (1 + 2 * 3) * M * K)
    gathered = sum(op.read_bytes + op.written_bytes for op in torch_ops.ops if op.name == "cat")
    factors = 4 * (2 * 3 * R * K + 3 * R * N)
    s = 4 * (3 + 3) * M * 3 * R
    assert (
        traffic.unique_bytes + torch_ops.unique_bytes
        == streams + gathered + factors + s + 4 * 3 * R * K
    )


def test_opcheck():
    x, parts = make(x=(3, 33), p=0.1, dtype=torch.bfloat16, factors=torch.float32)
    linears = [steps.Linear(part.weight, part.bias, part.lora) for part in parts]
    linears = [linears[0], linears[1]._replace(bias=None), linears[2]._replace(lora=None)]
    opcheck(steps, steps.Linears(x, linears))


def test_gradients_of_strided_outputs():
    x, parts = make(x=(6, 33), dtype=torch.bfloat16)
    dys = [draw((6, n), x.dtype, torch.Generator().manual_seed(n), "transposed") for n in WIDTHS]
    plain = run(x, parts, [dy.contiguous() for dy in dys])
    for name, value in run(x, parts, dys).items():
        assert torch.equal(value, plain[name]), name
