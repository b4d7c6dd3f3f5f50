"""``lora_swiglu_mlp`` by Triton: every output and gradient within its bound, bytes, what it keeps and what it never makes."""

from dataclasses import replace

import lora_cases as cases
import pytest
import torch
from lora_cases import LAYOUTS, MIXED, activation_and_slope, draw, subsets
from mlp_cases import LINEARS, NAMES, make, output_grad, run, tensors
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    scaled,
    watched,
)
from triton_linear import narrow_product

from lab.eager import EagerTraffic
from lab.steps import step
from lab.testing import Bound, kept_for_backward
from peftkit_kernels.core.dropout import dropout_mask
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.low_rank.groups import group
from peftkit_kernels.ops.lora_linear import triton_passes
from peftkit_kernels.ops.lora_linear.schedule import Linear as FrozenLinear
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS, lora_swiglu_mlp, passes
from peftkit_kernels.ops.lora_swiglu_mlp import schedule as steps
from peftkit_kernels.ops.lora_swiglu_mlp.config import GateBackwardConfig, GateConfig


@pytest.fixture(params=["fused", "addmm"])
def schedule(request, monkeypatch):
    """Both schedules of the down projection, whatever would be chosen."""
    monkeypatch.setattr(triton_passes, "fuses_gemm", lambda *a, **k: request.param == "fused")
    return request.param


class Projection:
    """A linear with its adapter on rows that may have an error, in the kernels' roundings."""

    def __init__(self, x, part, dtype):
        self.x, self.part, self.dtype, self.lora = x, part, dtype, part.lora
        self.weight = Bound.of(part.weight)
        if self.lora is None:
            return
        self.factors = self.lora.A.dtype
        self.wide = torch.promote_types(dtype, self.factors)
        self.A, self.B = (Bound.of(t) for t in (self.lora.A, self.lora.B))
        self.dropped = self.masked(x)
        self.s = scaled(self.dropped @ self.A.T, 1.0, self.lora.p).round(self.wide)

    def masked(self, value):
        """What the dropout keeps of it; the factor is applied to a sum."""
        if not self.lora.p:
            return value
        return value * dropout_mask(*value.value.shape, self.lora.p, self.lora.seed)

    def frozen(self):
        y = self.x @ self.weight.T
        if self.part.bias is not None:
            y = Bound.of(self.part.bias).addmm(self.x, self.weight.T)
        return y.round(self.dtype)

    def update(self):
        return scaled(self.narrow_product(self.s, self.B.T), self.lora.scale)

    def narrow_product(self, s, factor):
        """Of an s and a factor, in the dtypes of this linear."""
        return narrow_product(s, factor, self.dtype, self.wide)

    def backward(self, dy):
        """The gradients of the parameters; ``ds`` is kept."""
        grads = {"bias": dy.sum(0).round(self.dtype)}
        if self.lora is None:
            return grads
        self.ds = scaled(dy @ self.B, self.lora.scale).round(self.wide)
        dA = scaled(self.ds.T @ self.dropped, 1.0, self.lora.p)
        dB = scaled(dy.T @ self.s, self.lora.scale)
        return grads | {"A": dA.round(self.factors), "B": dB.round(self.factors)}


def bounds(x, parts, dy, act, schedule="fused"):
    """The bound of each result of ``run``: updates are added to e, g and dh in float32, where they are read."""
    dtype = x.dtype
    rows = Bound.of(x.detach().reshape(-1, x.shape[-1]))
    gate, up = (Projection(rows, part, dtype) for part in parts[:2])
    e, g = (p.frozen() + p.update() if p.lora else p.frozen() for p in (gate, up))
    a, slope = activation_and_slope(e, act)
    down = Projection((a * g).round(dtype), parts[2], dtype)
    y = down.frozen()
    if down.lora:
        y = down.update()
        bias = None if parts[2].bias is None else Bound.of(parts[2].bias)
        if schedule == "addmm":
            y = (y if bias is None else y + bias).round(dtype)
        y = y.addmm(down.x, down.weight.T)
        y = (y + bias if schedule == "fused" and bias is not None else y).round(dtype)
    expected = {"y": y}

    dy = Bound.of(dy.reshape(-1, dy.shape[-1]))
    expected |= {f"{name}_down": grad for name, grad in down.backward(dy).items()}
    dh = (dy @ down.weight).round(dtype)
    if down.lora:
        dh = dh + down.masked(scaled(down.narrow_product(down.ds, down.A), 1.0, down.lora.p))
    de, dg = (dh * g * slope).round(dtype), (dh * a).round(dtype)
    for linear, grad, suffix in ((gate, de, "_gate"), (up, dg, "_up")):
        expected |= {name + suffix: value for name, value in linear.backward(grad).items()}
    linears, dx = (gate, up), None
    for members in group([linear.lora for linear in linears]):
        joint = Bound.cat([linears[i].ds for i in members], 1)
        A = Bound.cat([linears[i].A for i in members], 0)
        first = linears[members[0]]
        update = first.masked(scaled(first.narrow_product(joint, A), 1.0, first.lora.p))
        dx = (update if dx is None else dx + update).round(dtype)
    for linear, grad in zip(linears, (de, dg), strict=True):
        dx = (grad @ linear.weight if dx is None else dx.addmm(grad, linear.weight)).round(dtype)
    return expected | {"x": dx}


def check(x, parts, act="silu", schedule="fused", layout="contiguous", **watch):
    """Run one case, watched, and compare all of it; returns the names of what was compared."""
    dy = output_grad(x, layout)
    with watched(**watch):
        results = run(x, parts, dy, act, backend="triton")
    expected = bounds(x, parts, dy, act, schedule)
    for name, value in results.items():
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return set(results)


@pytest.mark.parametrize("p", [(0.0,) * 3, (0.1, 0.5, 1.0), (1.0, 0.1, 0.1)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), MIXED[0]], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, act, p):
    x, parts = make(p, dtype=dtype, factors=factors)
    assert check(x, parts, act) == {"x", "y", *NAMES}


@pytest.mark.parametrize("rank", [1, 16, 24, 64])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_any_number_of_rows_and_rank(rows, rank, schedule):
    x, parts = make((0.1, 0.0, 0.1), x=(rows, 31), rank=rank, dtype=torch.bfloat16)
    assert len(check(x, parts, schedule=schedule)) == 11


@pytest.mark.parametrize(("width", "inner"), [(1, 1), (7, 130), (64, 64), (130, 7)])
def test_any_width(width, inner):
    x, parts = make((0.1,) * 3, inner=inner, x=(17, width), dtype=torch.float16)
    assert len(check(x, parts)) == 11


def test_ranks_may_differ():
    x, parts = make(dtype=torch.bfloat16)
    wide = make(rank=19, dtype=torch.bfloat16)[1]
    for i in range(3):
        mixed = [wide[j] if i == j else part for j, part in enumerate(parts)]
        assert len(check(x, mixed)) == 11


@pytest.mark.parametrize("biased", [(), ("_up",)], ids=str)
@pytest.mark.parametrize("adapted", [(), *subsets(LINEARS)], ids=str)
def test_any_linear_may_lack_an_adapter_or_a_bias(adapted, biased):
    x, parts = make((0.1, 0.0, 0.1), adapted, biased, dtype=torch.bfloat16)
    assert len(check(x, parts)) == 2 + len(biased) + 2 * len(adapted)


def _double(leaf):
    return leaf.detach().double().requires_grad_(leaf.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [None, ("A_down",), ("B_gate", "A_down", "bias_up")], ids=str)
def test_ranks_beyond_the_registers_are_computed_by_passes_of_their_own(trained, dtype):
    """The product of each linear then contains its update, as in ``lora_qkv``."""
    options = {} if trained is None else {"trained": trained}
    ranks = 17 if dtype is torch.float32 else 140
    x, parts = make((0.0, 0.0, 0.3), rank=ranks, dtype=dtype, **options)
    dy = output_grad(x)
    with watched() as traffic:
        found = run(x, parts, dy, backend="triton")
    wide = [
        cases.Projection(
            part.weight.double(),
            _double(part.bias),
            replace(part.lora, A=_double(part.lora.A), B=_double(part.lora.B)),
        )
        for part in parts
    ]
    expected = run(x.detach().double().requires_grad_(x.requires_grad), wide, dy.double())
    plain = run(x, parts, dy, backend="torch")
    for name, value in found.items():
        own, torchs = (
            (t.double() - expected[name]).norm() / expected[name].norm()
            for t in (value, plain[name])
        )
        assert own <= 2 * torchs + 1e-6, name
    kernels = [launch.kernel for launch in traffic.launches]
    assert "shrink_kernel" in kernels
    assert "expand_kernel" in kernels


def test_one_mask_for_gate_and_up():
    x, parts = make((0.2,) * 3, dtype=torch.bfloat16)
    parts[1] = replace(parts[1], lora=replace(parts[1].lora, seed=parts[0].lora.seed))
    assert len(group([part.lora for part in parts[:2]])) == 1
    assert len(check(x, parts)) == 11


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    x, parts = make((0.0, 0.1, 0.1), x=(2, 5, 33), layout=layout, dtype=torch.bfloat16)
    assert len(check(x, parts, layout=layout)) == 11


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_scale(scale):
    assert len(check(*make(scale=scale))) == 11


def test_offsets_of_rows_do_not_overflow():
    x, parts = make((0.1,) * 3, inner=88, x=(70, 72), rank=8, dtype=torch.bfloat16)
    assert len(check(x, parts, int32_limit=2 * INT32_LIMIT)) == 11


def test_results_do_not_depend_on_the_order_of_programs():
    x, parts = make((0.1,) * 3, inner=150, x=(130, 72), rank=8, dtype=torch.bfloat16)
    dy = output_grad(x)
    assert_same_bits_in_any_order(lambda: tuple(run(x, parts, dy, backend="triton").values()))


TRAINED = ("x", "bias_up", "A_gate", "A_down", "B_down")


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors_and_what_it_keeps(trained):
    x, parts = make((0.1, 0.0, 0.1), trained=trained)
    with kept_for_backward(*(t for part in parts for t in part.tensors().values())) as kept:
        y = lora_swiglu_mlp(x, *tensors(parts), backend="triton")
    assert y.requires_grad
    M, D, F, R = 17, 33, 21, 4
    gate = 2 * F + 2 * R if set(trained) != {"B_down"} else 0
    assert kept.total_bytes == 4 * M * (
        D * ("A_gate" in trained) + gate + R * ("B_down" in trained)
    )
    assert check(x, parts) == {"y", *trained}


@pytest.mark.parametrize("value", [1e3, -1e3, 1e18, -1e18])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_far_ends_of_the_activations(act, value):
    """Gates that are fully open or shut: the value itself or nothing, and no overflow on the way."""
    x = torch.ones(2, 1, requires_grad=True)
    weights = (torch.full((3, 1), value), torch.ones(3, 1), torch.ones(1, 3))
    y = lora_swiglu_mlp(x, weights, (None,) * 3, (None,) * 3, act, backend="triton")
    open_gate = 3 * max(value, 0.0)
    torch.testing.assert_close(y, torch.full((2, 1), open_gate))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full((2, 1), 2 * open_gate))


SMALL = GateConfig(32, 16, 3), GateBackwardConfig(16, 32, 32)
"""Tiles small enough that every loop and grid axis has several."""


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_do_not_matter_and_each_stream_moves_once(dtype, p):
    M, F, R = 70, 96, 5
    gate, up, dh, s_gate, s_up = (draw_one((M, n), dtype) for n in (F, F, F, R, R))
    A, B, ds = (draw_one(shape, dtype) for shape in ((R, F), (F, R), (M, R)))
    lora = LoRA(A, B, -1.7, p, 2**62 + 5)
    results = []
    for config in ((None, None), SMALL):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            h, s = passes.gate_forward(
                *(gate, up, (s_gate, s_up), (lora,) * 3, "silu"), config=config[0]
            )
            d_gate, d_up, dA = passes.gate_backward(
                *(dh, gate, up, (s_gate, s_up), ds, (lora,) * 3, "silu"),
                needs_dA=True,
                config=config[1],
            )
        results.append((h, s, d_gate, d_up, dA))
        arguments = [(name, a) for call in traffic.launches for name, a in call.arguments.items()]
        reads = [a.load for name, a in arguments if name in ("gate_ptr", "up_ptr", "dh_ptr")]
        writes = [a.store for name, a in arguments if name in ("h_ptr", "d_gate_ptr", "d_up_ptr")]
        assert (len(reads), len(writes)) == (5, 3)
        for read in reads:
            assert read.requested_bytes == read.unique_bytes == read.sector_bytes == gate.nbytes
        for written in writes:
            assert written.requested_bytes == written.unique_bytes == gate.nbytes
    assert len(traffic.launches) == 4  # the small tiles leave partial sums of s and of dA
    for first, second in zip(*results, strict=True):
        unit = torch.finfo(dtype).eps * first.abs().max()
        assert (first - second).abs().max() <= 2 * unit


def draw_one(shape, dtype):
    return draw(shape, dtype, torch.Generator().manual_seed(sum(shape)))


def in_one_buffer(parts):
    """The parts, weights of gate and up one above the other."""
    gate, up, down = parts
    weights = torch.cat([gate.weight, up.weight]).split(len(gate.weight))
    pairs = zip((gate, up), weights, strict=True)
    return [*(replace(part, weight=weight) for part, weight in pairs), down]


@pytest.mark.parametrize("biased", [(), ("_up",), LINEARS], ids=str)
@pytest.mark.parametrize("adapted", [(), ("_gate",), LINEARS], ids=str)
def test_gate_and_up_in_one_buffer_are_one_product(adapted, biased):
    x, parts = make((0.1, 0.0, 0.1), adapted, biased, dtype=torch.bfloat16)
    products = []
    for given in (parts, in_one_buffer(parts)):
        assert len(check(x, given)) == 2 + len(biased) + 2 * len(adapted)
        with EagerTraffic() as torch_ops:
            run(x, given, output_grad(x), backend="triton")
        products.append(sum(op.product is not None for op in torch_ops.ops))
    one_bias = len({"_gate", "_up"} & set(biased)) == 1
    assert products[0] - products[1] == (1 if one_bias else 2)


@pytest.mark.parametrize("one_buffer", [False, True])
def test_bytes_are_those_of_the_formula(monkeypatch, one_buffer):
    """Operation's README: 14 streams of [M, D] (11 with one buffer), 16 of [M, F], each weight twice, besides what has rank R."""
    monkeypatch.setattr(triton_passes, "fuses_gemm", lambda *a, **k: False)
    M, D, F, R = 300, 256, 576, 16
    options = {"biased": (), "inner": F, "x": (M, D), "rank": R, "dtype": torch.bfloat16}
    x, parts = make(**options)
    if one_buffer:
        parts = in_one_buffer(parts)
    call = steps.MLP(x, list(map(FrozenLinear, *tensors(parts))), "silu")
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is traffic of its own
    with watched() as traffic, EagerTraffic() as torch_ops, torch.no_grad():
        step(steps, call)
    streams = (11 if one_buffer else 14) * M * D + 16 * M * F + 6 * D * F
    # of gate and up: s is written once and read 3 times, ds written once and read twice; of down: s 1 and 2, ds 1 and 1
    small = M * R * (2 * (4 + 3) + 3 + 2)
    # each factor is read twice and its gradient written; B of gate and up is read for e and g once more in the backward, their
    # A's are stacked twice
    small += R * (2 * 3 * D + 2 * 4 * F + 3 * F + 3 * D + 2 * 2 * 2 * D)
    # float32, written and read: 3 shares of F for s; 2 chunks of rows for every gradient, 2 blocks of columns of de and dg
    partials = 2 * R * (3 * M + 2 * F + 2 * D + 2 * (2 * F + 2 * M) + 2 * 2 * D)
    total = traffic.unique_bytes + torch_ops.unique_bytes
    assert total == 2 * (streams + small) + 4 * partials
    kernels = [launch.kernel for launch in traffic.launches if launch.kernel != "sum_kernel"]
    assert kernels == [
        *("shrink_kernel", "gate_forward_kernel", "expand_kernel"),
        *("tall_kernel", "gate_backward_kernel", "tall_kernel", "tall_kernel"),
        *("expand_kernel", "tall_kernel"),
    ]
    # the only updates that are passes of their own are those of y and dx; none is over [M, F]
    for launch in traffic.launches:
        if launch.kernel == "expand_kernel":
            assert launch.arguments["y_ptr"].store.unique_bytes == x.nbytes


def eager(x, weights, factors, p):
    """PEFT's layers, with the dropout a GPU runs as one kernel."""

    def linear(x, weight, A, B):
        d = torch.native_dropout(x, p, True)[0] if p else x
        update = torch.nn.functional.linear(torch.nn.functional.linear(d, A), B)
        return torch.nn.functional.linear(x, weight) + update * 2.0

    gate, up, down = zip(weights, *factors, strict=True)
    return linear(torch.nn.functional.silu(linear(x, *gate)) * linear(x, *up), *down)


@pytest.mark.parametrize(
    ("p", "own_masks", "one_buffer", "ratio", "kept"),
    [
        (0.0, False, True, 0.40, 0.54),
        (0.1, False, True, 0.35, 0.44),
        (0.1, True, True, 0.363, 0.44),
        (0.0, False, False, 0.406, 0.54),
        (0.1, False, False, 0.358, 0.44),
        (0.1, True, False, 0.375, 0.44),
    ],
)
def test_bytes_against_eager_at_training_sizes(p, own_masks, one_buffer, ratio, kept):
    """At M 8192, D 4096, F 14336, R 16: the passes by the formula that the test above holds them to, eager counted on meta."""
    M, D, F, R = 8192, 4096, 14336, 16

    def meta(*shape, grad=True):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=grad)

    x, sizes = meta(M, D), ((F, D), (F, D), (D, F))
    weights = [meta(*size, grad=False) for size in sizes]
    factors = [meta(R, K) for _, K in sizes], [meta(N, R) for N, _ in sizes]
    saved: dict[int, int] = {}

    def pack(t):
        if t.shape[0] == M:
            saved[id(t)] = t.numel() * t.element_size()
        alive.append(t)
        return t

    alive: list[torch.Tensor] = []
    with EagerTraffic() as plain, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        eager(x, weights, factors, p).backward(meta(M, D, grad=False))
    streams = 2 * ((11 if one_buffer else 14) * M * D + 16 * M * F + 6 * D * F)
    if own_masks:  # gate and up shrink, expand into dx and form dA each on their own
        streams += 2 * 4 * M * D
    by_rows, by_columns = 1 / 1024, 1 / 512
    partials = 8 * R * (3 * M * F * by_rows + 2 * M * F * by_columns + 3 * M * D * by_rows)
    frozen = 2 * ((5 if one_buffer else 7) * M * D + 14 * M * F + 6 * D * F)
    assert (streams + partials) / plain.unique_bytes <= ratio
    assert own_masks or streams + partials <= 1.25 * frozen
    assert 2 * M * (D + 2 * F + 3 * R) / sum(saved.values()) <= kept + 0.005


def test_opcheck():
    x, parts = make((0.1, 0.0, 0.1), x=(3, 33), dtype=torch.bfloat16, factors=torch.float32)
    weights, biases, loras = (list(part) for part in tensors(parts))
    for given in ((biases, loras), ([biases[0], None, None], [None, loras[1], None])):
        opcheck(steps, steps.MLP(x, list(map(FrozenLinear, weights, *given)), "gelu"))


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1])
def test_small_updates_survive_in_bfloat16_better_than_in_plain_torch(std):
    """Plain torch rounds each product, each update and each sum; the kernels add gate's and up's updates in float32."""
    generator = torch.Generator().manual_seed(0)
    M, D, inner, R = 64, 64, 96, 8
    sizes = [(inner, D), (inner, D), (D, inner)]

    def normal(*shape, size):
        return (torch.randn(shape, generator=generator) * size).to(torch.bfloat16)

    x = normal(M, D, size=1.0)
    weights = [normal(n, k, size=k**-0.5) for n, k in sizes]
    loras = [LoRA(normal(R, k, size=k**-0.5), normal(n, R, size=std), 2.0) for n, k in sizes]
    untrained = [replace(lora, B=torch.zeros_like(lora.B)) for lora in loras]

    def plain(loras, dtype):
        def linear(x, weight, lora):
            A, B = lora.A.to(dtype), lora.B.to(dtype)
            return x @ weight.to(dtype).t() + (x @ A.t() @ B.t()) * lora.scale

        gate, up, down = zip(weights, loras, strict=True)
        rows = x.to(dtype)
        return linear(torch.nn.functional.silu(linear(rows, *gate)) * linear(rows, *up), *down)

    def ours(loras):
        return lora_swiglu_mlp(x, weights, [None] * 3, loras, "silu", backend="triton")

    truth = plain(loras, torch.float64)
    effect = truth - plain(untrained, torch.float64)

    def errors(y, without):
        y, without = y.double(), without.double()
        return (y - truth).norm(), (y - without - effect).norm()

    error, lost = errors(ours(loras), ours(untrained))
    plain_error, plain_lost = errors(plain(loras, torch.bfloat16), plain(untrained, torch.bfloat16))
    assert error <= 0.8 * plain_error
    assert lost <= 0.8 * plain_lost
