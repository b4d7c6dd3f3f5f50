"""``prefix_attention`` by Triton: the merge and a gate's gradient within tight bounds, the whole op, bytes, no copy of the cache."""

import math
import re

import pytest
import torch
from attention_bounds import exact
from lora_cases import subsets
from prefix_cases import MASKS, NAMES, SHAPES, check, make, masking, run
from torch.utils.checkpoint import checkpoint
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    draw,
    opcheck,
    watched,
)

from lab.steps import step
from lab.testing import Bound, Made, kept_for_backward
from peftkit_kernels.core.launch import INTERPRETED, recording
from peftkit_kernels.ops.prefix_attention import prefix_attention, schedule
from peftkit_kernels.ops.prefix_attention.config import MergeConfig
from peftkit_kernels.ops.prefix_attention.flash import Pass
from peftkit_kernels.ops.prefix_attention.passes import add_gated, gate_grad, merge

B, S, H, D = 2, 21, 3, 20
EXP2_ULPS, LOG2_ULPS, DIVIDE_ULPS = 2.0, 2.0, 2.0
"""Errors of the GPU's approximations, CUDA C++ Programming Guide, table of intrinsic functions."""
CONFIGS = (None, MergeConfig(4, 32))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gating = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def parts(dtype, D=D):
    """Outputs and log-sum-exps of two passes; some queries see nothing in the first."""
    o1, o2 = draw(B, S, H, D, dtype=dtype), draw(B, S, H, D, dtype=dtype, seed=1)
    l1, l2 = draw(B, H, S) * 4, draw(B, H, S, seed=1) * 4
    l1[1, :, :5] = -torch.inf
    o1[1, :5] = torch.nan
    return o1, l1, o2, l2


def merge_bounds(o1, l1, o2, l2):
    """In units of log2(e) as the kernel computes: rounded once, divided by the sum of two exponentials."""
    blind = l1 == -torch.inf
    log2e, ln2 = (
        exact(torch.tensor(f(2.0)).double()).round(torch.float32)
        for f in (lambda v: 1 / math.log(v), math.log)
    )
    y1, y2 = (Bound.of(t) * log2e for t in (l1.masked_fill(blind, 0.0), l2))
    top = exact(torch.where(blind, y2.value, torch.maximum(y1.value, y2.value)))
    e1, e2 = (
        (y - top).map(
            torch.exp2,
            math.log(2) * torch.exp2((y - top).value + (y - top).error),
            EXP2_ULPS,
            torch.exp2,
        )
        for y in (y1, y2)
    )
    e1 = e1 * ~blind
    total = e1 + e2
    least = total.value - total.error
    lse = (total.map(torch.log2, 1 / (math.log(2) * least), LOG2_ULPS) + top) * ln2
    inverse = total.map(torch.reciprocal, least**-2, DIVIDE_ULPS)

    def column(weight):
        return Bound(
            *(t.transpose(1, 2)[..., None] for t in (weight.value, weight.error)), weight.unit
        )

    first = Bound.of(o1.masked_fill(blind.transpose(1, 2)[..., None], 0.0))
    out = first * column(e1 * inverse) + Bound.of(o2) * column(e2 * inverse)
    return out.round(o1.dtype), lse


@every_dtype
@pytest.mark.parametrize("D", [1, 20, 64])
def test_merge(dtype, D):
    for config in CONFIGS if D <= 32 else (None,):
        tensors = parts(dtype, D)
        expected = merge_bounds(*tensors)
        with watched(int32_limit=INT32_LIMIT) as traffic:
            out, lse = merge(*tensors, config=config)
        expected[0].check(out, "out")
        expected[1].check(lse, "lse")
        # each part read once, the output and the log-sum-exp written once
        assert traffic.unique_bytes == 3 * out.nbytes + 3 * lse.nbytes
        assert traffic.launches[0].total("requested_bytes") == traffic.unique_bytes


@every_dtype
def test_gate_and_its_gradient(dtype):
    o1, _, o2, _ = parts(dtype)
    o1, gate, dout = o1.nan_to_num(), draw(H), draw(B, S, H, D, dtype=dtype, seed=2)
    factor = Bound.of(gate[:, None])
    for config in CONFIGS:
        with watched(int32_limit=INT32_LIMIT) as traffic:
            out = add_gated(o1, o2, gate, config=config)
            do2, dgate = gate_grad(dout, o2, gate, config=config)
        (Bound.of(o1) + Bound.of(o2) * factor).round(dtype).check(out, "out")
        (Bound.of(dout) * factor).round(dtype).check(do2, "do2")
        (Bound.of(dout) * Bound.of(o2)).sum(3).sum(1).sum(0).check(dgate, "dgate")
        for launch, streams in zip(traffic.launches, (3, 3), strict=True):
            blocks = launch.grid[1]
            small = gate.nbytes + (launch.kernel == "gate_grad_kernel") * 4 * blocks * B * H
            assert launch.total() == streams * out.nbytes + small


def test_kernels_do_not_depend_on_the_order_of_programs():
    tensors, gate = [t.nan_to_num() for t in parts(torch.bfloat16)], draw(H)
    assert_same_bits_in_any_order(
        lambda: (
            *merge(*tensors, config=CONFIGS[1]),
            add_gated(tensors[0], tensors[2], gate, config=CONFIGS[1]),
            *gate_grad(tensors[0], tensors[2], gate, config=CONFIGS[1]),
        )
    )


def test_a_nan_is_not_hidden():
    o1, l1, o2, l2 = parts(torch.float32)
    l1[0, 1, 2] = torch.nan
    out, _ = merge(o1, l1, o2, l2)
    assert out[0, 2, 1].isnan().all()
    spoilt = torch.zeros(B, S, H, dtype=torch.bool)
    spoilt[0, 2, 1] = True
    assert torch.equal(out.isnan().any(3), spoilt)


@gating
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["odd head size", "odd head size, grouped heads", "one query"])
def test_within_the_error_bound(name, kind, gated):
    shape = SHAPES[name]
    with watched():
        check(shape, *make(shape, gated=gated), backend="triton", **masking(shape, kind))


@gating
@pytest.mark.parametrize("prefix", [None, torch.float32], ids=["same", "float32_prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype, prefix, gated):
    shape = SHAPES["odd head size"]
    with watched():
        check(shape, *make(shape, dtype, gated, prefix), backend="triton", causal=True)


@pytest.mark.parametrize("trained", subsets(("q", "k", "prefix_k", "gate")), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    shape = SHAPES["one query"]
    leaves, dout = make(shape, gated=True, trained=trained)
    every, _ = make(shape, gated=True)
    expected, actual = (run(tensors, dout, backend="triton") for tensors in (every, leaves))
    assert actual.keys() == {"out", *trained}
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@gating
def test_keeps_what_the_readme_says(gated):
    shape = SHAPES["odd head size"]
    B, H, _, S, _, _, D = shape
    leaves, _ = make(shape, gated=gated)
    with kept_for_backward(*leaves.values()) as kept:
        out = prefix_attention(
            *(leaves[name] for name in NAMES), 0.3, gate=leaves.get("gate"), backend="triton"
        )
    assert out.requires_grad
    assert kept.total_bytes == 4 * (1 + gated) * (B * S * H * D + B * H * S)


def test_the_cache_is_not_copied():
    shape = (1, 4, 2, 1, 512, 16, 32)
    leaves, _ = make(shape, trained=())
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN returns it once more
    call = schedule.Prefixed(*(leaves[name] for name in NAMES), None, None, 0.3, False)
    with Made(*leaves.values()) as made:
        schedule.forward(schedule.TritonPasses(), call)
    # the output is the largest
    assert made.largest_bytes == 4 * 4 * 32


@gating
@pytest.mark.parametrize("S", [1, 64])
def test_the_passes_of_a_gpu_take_the_tensors_as_they_are(S, gated):
    """On meta tensors: what torch's flash attention for GPUs is called with, grouped heads and a cache with room left."""
    B, H, G, T, P, D = 2, 8, 2, 64, 16, 64

    def meta(*size):
        return torch.empty(*size, dtype=torch.bfloat16, device="meta")

    cache = [meta(B, G, 4 * T, D)[:, :, :T] for _ in range(2)]
    q, prefix, gate = meta(B, S, H, D).transpose(1, 2), [meta(G, P, D) for _ in range(2)], meta(H)
    tensors = (q, *cache, *prefix, gate if gated else None)
    with recording(INTERPRETED) as launches, Made(*cache) as made:
        out, _, grads = step(schedule, schedule.Prefixed(*tensors, None, 0.3, S > 1))
    assert out.shape == (B, S, H, D)
    for grad, t in zip(grads, tensors, strict=True):
        assert grad is t is None or grad.shape == t.shape
    assert len(launches) == 1 + gated
    assert made.calls


@gating
def test_opcheck(gated):
    leaves, _ = make((2, 4, 2, 3, 3, 2, 4), torch.bfloat16, gated, torch.float32)
    tensors = [leaves[name] for name in NAMES]
    opcheck(schedule, schedule.Prefixed(*tensors, leaves.get("gate"), None, 0.5, True))


@gating
def test_compiled_without_graph_break(gated):
    shape = SHAPES["odd head size"]
    leaves, dout = make(shape, torch.bfloat16, gated, torch.float32)
    expected = run(leaves, dout, causal=True, backend="triton")
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
    actual = run(leaves, dout, compiled, causal=True, backend="triton")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_modes_repetition_and_refusals():
    shape = SHAPES["odd head size"]
    leaves, dout = make(shape)
    options = {"causal": True, "backend": "triton"}
    expected, again = run(leaves, dout, **options), run(leaves, dout, **options)
    assert all(torch.equal(again[name], value) for name, value in expected.items())

    def op(q):
        others = (leaves[name] for name in NAMES[1:])
        return prefix_attention(q, *others, shape[-1] ** -0.5, **options)

    for reentrant in (True, False):
        checkpoint(op, leaves["q"], use_reentrant=reentrant).backward(dout)
        for name in NAMES:
            assert torch.equal(leaves[name].grad, expected[name]), name
            leaves[name].grad = None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(op(leaves["q"]), expected["out"])
    out = op(leaves["q"])
    assert not out._is_view()
    (dq,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^prefix_attention is once_differentiable"):
        dq.sum().backward()


def test_what_triton_cannot_compute_is_refused_by_name():
    leaves, dout = make(SHAPES["one query"], torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton'.*float64; the kernels compute in"):
        run(leaves, dout, backend="triton")
    leaves, dout = make((2, 2, 2, 4, 4, 0, 32))
    with pytest.raises(
        ValueError, match=r"backend='triton': prefix_k is empty; use backend='auto'"
    ):
        run(leaves, dout, backend="triton")


@pytest.mark.parametrize(
    ("dtype", "D", "mask", "sentence"),
    [
        (torch.bfloat16, 64, None, None),
        (torch.bfloat16, 64, True, "flash attention for GPUs supports no mask"),
        (torch.float32, 64, None, "q is torch.float32; .* computes in 16 bits"),
        (torch.float16, 20, None, "the head size is 20; .* multiples of 8 up to 256"),
    ],
)
def test_obstacles_on_a_gpu_are_sentences(dtype, D, mask, sentence):
    q = torch.empty(1, 2, 3, D, dtype=dtype, device="meta")
    found = Pass(0.3, False, None if mask is None else torch.ones(1)).obstacle(q)
    assert found is None if sentence is None else re.search(sentence, found)
