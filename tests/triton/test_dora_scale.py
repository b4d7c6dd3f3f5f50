"""``dora_scale`` and ``dora_gate`` by Triton: results within their bounds, each stream moved once, what is kept and made again."""

import pytest
import torch
from dora_scale_cases import (
    TRAINED,
    N,
    apply,
    bounds,
    gate_bounds,
    gate_case,
    inverse_of,
    leaves,
    results,
)
from lora_cases import LAYOUTS, MIXED, draw, subsets
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, opcheck, watched
from triton_cases import draw as normal

from lab.case import Sizes
from lab.cases import build
from lab.devices import H100
from lab.predict import kernels_of_op, kernels_of_torch
from lab.testing import Bound, kept_for_backward
from peftkit_kernels.core import recompute
from peftkit_kernels.core.launch import Target
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.dora_scale import (
    Scale,
    dora_gate,
    dora_scale,
    gate_schedule,
    passes,
    schedule,
)
from peftkit_kernels.ops.dora_scale.config import BackwardConfig, ForwardConfig
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS, lora_swiglu_mlp

mixed_dtypes = pytest.mark.parametrize(
    ("dtype", "own"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
any_shape = pytest.mark.parametrize(
    ("leading", "width"), [((), 33), ((1,), 1), ((65,), 7), ((3, 2, 7), 130), ((150,), 16)], ids=str
)


def check(tensors, layout="contiguous", **watch):
    """Run one case, watched, and compare all of it; returns the launches."""
    z = tensors["z"]
    dy = draw(tuple(z.shape), z.dtype, torch.Generator().manual_seed(1), layout)
    with watched(**watch) as traffic:
        actual = results(tensors, dy, backend="triton")
    for name, value in actual.items():
        assert value.dtype == tensors[name if name in tensors else "z"].dtype
    compare(actual, bounds(tensors, dy))
    return traffic.launches


def check_gate(act, layout="contiguous", int32_limit=None, **options):
    """The same of a gate."""
    case, norms = gate_case(act, layout=layout, **options)
    watch = {} if int32_limit is None else {"int32_limit": int32_limit}
    z = case.leaves["z_e"]
    dh = draw(tuple(z.shape), z.dtype, torch.Generator().manual_seed(1), layout)
    with watched(**watch) as traffic:
        h = case.apply(case.leaves, backend="triton")
        grads = torch.autograd.grad(h, list(case.leaves.values()), dh)
    actual = {"output0": h.detach()} | dict(zip(case.leaves, grads, strict=True))
    for name, value in actual.items():
        assert value.dtype == case.leaves[name if name in case.leaves else "z_e"].dtype
    compare(actual, gate_bounds(case.leaves, norms, dh, act))
    return traffic.launches


def compare(actual, expected):
    for name, value in actual.items():
        expected[name].check(value.reshape(expected[name].value.shape), name)


@pytest.mark.parametrize("layout", LAYOUTS)
@mixed_dtypes
def test_within_the_error_bound(dtype, own, layout):
    check(leaves(dtype, own, layout=layout), layout)


@any_shape
def test_any_shape(leading, width):
    for dtype in (torch.float32, torch.bfloat16):
        check(leaves(dtype, leading=leading, N=width))


@pytest.mark.parametrize("act", ACTIVATIONS)
@mixed_dtypes
def test_gate_within_the_error_bound(dtype, own, act):
    check_gate(act, dtype=dtype, own=own)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gate_of_strided_inputs_and_gradients(layout):
    check_gate("silu", layout, leading=(3, 5))


@any_shape
def test_gate_of_any_shape(leading, width):
    for dtype in (torch.float32, torch.bfloat16):
        check_gate("silu", dtype=dtype, leading=leading, N=width)


@pytest.mark.parametrize("biased", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(
    "magnitudes", [(True, True), (True, False), (False, True), (False, False)], ids=str
)
def test_either_side_of_a_gate_may_lack_a_magnitude_or_a_bias(magnitudes, biased):
    check_gate("gelu_tanh", magnitudes=magnitudes, biased=biased)


def test_absent_parts():
    z, magnitude, norm, bias = leaves(trained=()).values()
    plain = dora_scale(z, Scale(None, None, None), backend="triton")
    assert torch.equal(plain, z)
    plain += 1.0
    assert not torch.equal(plain, z), "an output of its own"
    assert torch.equal(dora_scale(z, Scale(None, None, bias), backend="triton"), z + bias)
    y = dora_scale(z, Scale(magnitude, norm, None), backend="triton")
    (Bound.of(z) * (Bound.of(magnitude) * inverse_of(norm))).check(y, "y")


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    """The gradients are those of all; only what they need is kept, read and written."""
    dy = draw((3, 5, N), torch.float32, torch.Generator().manual_seed(1))
    every, tensors = results(leaves(), dy, backend="triton"), leaves(trained=trained)
    with watched() as traffic:
        actual = results(tensors, dy, backend="triton")
    assert actual.keys() == {"y", *trained}
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    _, backward = traffic.launches
    of_row, streams = 4 * N, 1 + ("magnitude" in trained) + ("z" in trained)
    columns = ("z" in trained) + ("magnitude" in trained) + ("bias" in trained)
    assert backward.total() == of_row * (15 * streams + columns)
    with kept_for_backward(*tensors.values()) as kept:
        y = apply(tensors | {"z": tensors["z"] * 1}, backend="triton")
    assert y.requires_grad
    assert kept.total_bytes == of_row * (1 + 15 * ("magnitude" in trained))


def test_without_a_magnitude_the_gradient_passes_through():
    z, _, _, bias = leaves().values()
    y = dora_scale(z, Scale(None, None, bias), backend="triton")
    dy = normal(*y.shape)
    with watched() as traffic:
        dz, dbias = torch.autograd.grad(y, (z, bias), dy)
    assert torch.equal(dz, dy)
    Bound.of(dy.reshape(-1, N)).sum(0).check(dbias, "dbias")
    (sums,) = traffic.launches
    assert sums.total() == dy.nbytes + bias.nbytes


@pytest.mark.parametrize(
    "trained",
    [("z_e", "z_u"), ("z_u", "magnitude_u"), ("bias_e", "magnitude_e"), ("z_e", "bias_u")],
    ids="-".join,
)
def test_a_gate_adds_up_what_is_trained(trained):
    case, _ = gate_case("silu")
    dh = normal(17, N)

    def grads(tensors):
        h = case.apply(tensors, backend="triton")
        wanted = [name for name, t in tensors.items() if t.requires_grad]
        found = torch.autograd.grad(h, [tensors[name] for name in wanted], dh)
        return dict(zip(wanted, found, strict=True))

    every = grads(case.leaves)
    some = {k: t.detach().requires_grad_(k in trained) for k, t in case.leaves.items()}
    with watched() as traffic:
        actual = grads(some)
    assert actual.keys() == set(trained)
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    sums = sum(name[0] != "z" for name in trained)
    written = traffic.launches[-1].arguments.get("sums_ptr")
    assert (written.store.unique_bytes if written else 0) == 4 * N * sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_small_tiles(dtype, monkeypatch):
    """Every loop and every axis of the grid has several, and every sum several parts."""
    monkeypatch.setattr(passes, "ForwardConfig", lambda: ForwardConfig(8, 32))
    small = BackwardConfig(8, 32, 32)
    monkeypatch.setattr(BackwardConfig, "choose", lambda *sizes, **options: small)
    launches = check(leaves(dtype, leading=(70,), N=88), int32_limit=INT32_LIMIT)
    launches += check_gate("gelu", dtype=dtype, leading=(70,), N=88, int32_limit=INT32_LIMIT)
    assert [launch.kernel for launch in launches] == [
        *("scale_kernel", "scale_backward_kernel", "sum_kernel"),
        *("scaled_gate_kernel", "scaled_gate_backward_kernel", "sum_kernel"),
    ]


def test_offsets_of_rows_do_not_overflow():
    check(leaves(torch.bfloat16, leading=(90,), N=72), int32_limit=INT32_LIMIT)
    check_gate("silu", dtype=torch.bfloat16, leading=(90,), N=72, int32_limit=INT32_LIMIT)


def test_results_do_not_depend_on_the_order_of_programs():
    dy = normal(70, 130, dtype=torch.bfloat16)
    tensors = leaves(torch.bfloat16, leading=(70,), N=130)
    case, _ = gate_case("silu", torch.bfloat16, leading=(70,), N=130)

    def run():
        scaled = results(tensors, dy, backend="triton")
        return *scaled.values(), *case.run(backend="triton").values()

    assert_same_bits_in_any_order(run)


def streamed(launch, *names):
    """The loads and stores of arguments."""
    for name in names:
        argument = launch.arguments[name]
        yield argument.load if argument.load.unique_bytes else argument.store


def test_each_stream_moves_once():
    """README: 2 and 3 times M N; 3 and 5 times M F; and N numbers each of factors, biases and sums."""
    z, magnitude, norm, bias = leaves(torch.bfloat16, torch.float32, (48,), N=64).values()
    z.requires_grad_()
    with watched() as traffic:
        y = dora_scale(z, Scale(magnitude, norm, bias), backend="triton")
        torch.autograd.grad(y, (z, magnitude, bias), z.detach().clone())
    forward, backward = traffic.launches
    assert forward.total() == 2 * z.nbytes + (4 + 2) * 64
    assert backward.total() == 3 * z.nbytes + (4 + 2 * 4) * 64
    found = [
        *streamed(forward, "z_ptr", "y_ptr"),
        *streamed(backward, "dy_ptr", "z_ptr", "dz_ptr"),
    ]
    case, _ = gate_case("silu", torch.bfloat16, own=torch.float32, leading=(48,), N=64)
    with watched() as traffic:
        case.run(backend="triton")
    forward, backward = traffic.launches
    assert forward.total() == 3 * z.nbytes + 2 * (4 + 2) * 64
    assert backward.total() == 5 * z.nbytes + (2 * (4 + 2) + 4 * 4) * 64
    found += streamed(forward, "z_gate_ptr", "z_up_ptr", "h_ptr")
    found += streamed(backward, "dh_ptr", "z_gate_ptr", "z_up_ptr", "dz_gate_ptr", "dz_up_ptr")
    assert len(found) == 2 + 3 + 3 + 5
    for stream in found:
        assert stream.requested_bytes == stream.unique_bytes == stream.sector_bytes == z.nbytes


def test_bytes_of_partial_sums():
    """16 bytes a chunk and column of the gate, written and read again, and its sums once."""
    case, _ = gate_case("silu", torch.bfloat16, own=torch.float32, leading=(130,), N=64)
    with watched() as traffic:
        case.run(backend="triton")
    _, backward, sums = traffic.launches
    assert backward.arguments["sums_ptr"].store.unique_bytes == 3 * 16 * 64
    assert sums.total() == (3 + 1) * 16 * 64


@pytest.mark.parametrize(
    ("variant", "N", "ratio"), [("dora_scale", 4096, 0.187), ("dora_gate", 14336, 0.119)]
)
def test_bytes_against_eager_at_training_sizes(variant, N, ratio):
    """8192 rows, forward and backward: launches recorded, with their partial sums, and torch ops counted on meta."""
    case = build(
        "dora_scale",
        variant,
        Sizes(8192, 1, N),
        dtype=torch.bfloat16,
        device="meta",
        factors=torch.float32,
    )
    eager = sum(op.unique_bytes for op in kernels_of_torch(case.eager, case, H100))
    moved = sum(kernel.unique_bytes for kernel in kernels_of_op(case, H100))
    streams = (5 if variant == "dora_scale" else 8) * 8192 * N * 2
    assert streams < moved < 1.01 * streams
    assert moved <= ratio * eager


def test_a_magnitude_changed_after_the_forward_does_not_change_what_is_made_again():
    case, _ = gate_case("silu")
    h = case.apply(case.leaves, backend="triton")
    make, ingredients = recompute.saved_for(h, True)
    assert make is not None
    with torch.no_grad():
        case.leaves["magnitude_e"].mul_(2.0)
    with watched() as traffic:
        assert torch.equal(recompute.restore(make, ingredients), h)
    assert [launch.kernel for launch in traffic.launches] == ["scaled_gate_kernel"]


def test_what_consumes_the_gate_keeps_nothing_of_it():
    case, _ = gate_case("silu", torch.bfloat16)
    frozen, A, B = draw((3 * 16, N), torch.bfloat16, torch.Generator().manual_seed(1)).split(16)
    lora = LoRA(A.clone().requires_grad_(), B[:, :16].clone().requires_grad_(), 0.5)
    gradients = []
    for again in (True, False):
        h = case.apply(case.leaves, backend="triton")
        h = h if again else h * 1
        with kept_for_backward(frozen, lora.A, lora.B, *case.leaves.values()) as kept:
            y = lora_linear(h, frozen, None, lora)
        assert (h.untyped_storage().data_ptr() in kept.storages) != again
        gradients.append(torch.autograd.grad(y.sum(), (case.leaves["z_e"], lora.A, lora.B)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_keeps_the_two_z_alone():
    case, _ = gate_case("silu")
    with kept_for_backward(*case.leaves.values()) as kept:
        h = case.apply({name: t * 1 for name, t in case.leaves.items()}, backend="triton")
    assert h.requires_grad
    assert kept.total_bytes == 4 * N * (2 * 17 + 6), "two z, two factors, two norms, two biases"


@pytest.mark.parametrize("value", [1e3, -1e3, 1e18, -1e18])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_far_ends_of_the_activations(act, value):
    """Gates that are fully open or shut: the value itself or nothing, and no overflow on the way."""
    z_e = torch.full((2, 3), value, requires_grad=True)
    z_u = torch.ones(2, 3, requires_grad=True)
    plain = Scale(None, None, None)
    h = dora_gate((z_e, z_u), (plain, plain), act, backend="triton")
    torch.testing.assert_close(h, torch.full((2, 3), max(value, 0.0)))
    dz_e, dz_u = torch.autograd.grad(h.sum(), (z_e, z_u))
    torch.testing.assert_close(dz_e, torch.full((2, 3), float(value > 0)))
    torch.testing.assert_close(dz_u, torch.full((2, 3), max(value, 0.0)))


def test_the_gate_is_that_of_the_plain_mlp():
    """With a norm equal to its magnitude there is nothing to scale."""
    x, weights = normal(5, N), [normal(N, N) / N**0.5 for _ in range(2)]
    down = torch.eye(N)
    expected = lora_swiglu_mlp(x, (*weights, down), (None,) * 3, (None,) * 3, backend="triton")
    one = torch.ones(N)
    zs = tuple(x @ weight.T for weight in weights)
    h = dora_gate(zs, (Scale(one, one, None),) * 2, backend="triton")
    assert torch.equal(h, expected)


@pytest.mark.parametrize("op", ["dora_scale", "dora_gate"])
@pytest.mark.parametrize(("M", "N"), [(1, 64), (512, 2048), (8192, 4096), (65536, 14336)], ids=str)
def test_programs_fill_the_gpu_before_partial_sums_grow(op, M, N):
    target = Target("cuda:90", 132)
    c = BackwardConfig.choose(op, M, N, target=target)
    programs = -(-M // c.chunk_m) * -(-N // c.block_n)
    assert c.chunk_m % c.block_m == 0
    assert programs >= 4 * target.sms or c.chunk_m == 64
    longer = -(-M // (2 * c.chunk_m)) * -(-N // c.block_n)
    assert longer < 4 * target.sms or c.chunk_m == 1024


def test_a_float64_norm_is_refused_by_name():
    z, norm = torch.ones(2, 3), torch.ones(3, dtype=torch.float64)
    scale = Scale(torch.ones(3), norm, None)
    said = (
        r"one of its tensors is torch.float64; the kernels compute in at most float32; use backend="
    )
    with pytest.raises(ValueError, match=said):
        dora_scale(z, scale, backend="triton")
    with pytest.raises(ValueError, match=said):
        dora_gate((z, z), (Scale(None, None, None), scale), backend="triton")


def test_opcheck():
    z, magnitude, norm, bias = leaves(torch.bfloat16, torch.float32, (3,)).values()
    whole, frozen, plain = (
        Scale(magnitude, norm, bias),
        Scale(norm, norm, None),
        Scale(None, None, bias),
    )
    for scale in (whole, frozen, plain, Scale(None, None, bias.detach()), Scale(None, None, None)):
        opcheck(schedule, schedule.Scaled(z, scale))
    up = (z * 2).detach().requires_grad_()
    for scales in ([whole, plain], [frozen, whole], [plain, Scale(None, None, None)]):
        opcheck(gate_schedule, gate_schedule.Gate(z, up, scales, "gelu"))
