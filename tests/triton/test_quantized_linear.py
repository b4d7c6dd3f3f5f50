"""``nf4_linear`` and ``int8_linear`` by Triton: bounds of both schedules, bytes, and what they keep."""

import pytest
import torch
from lora_cases import LAYOUTS, MIXED, Projection, Shape, draw, gradients, subsets
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
from peftkit_kernels.core.calibration import Calibration
from peftkit_kernels.core.launch import INTERPRETED, Target
from peftkit_kernels.low_rank.config import fuses_gemm
from peftkit_kernels.ops.lora_linear import schedule as steps
from peftkit_kernels.ops.quantized_linear import int8_linear, nf4_linear
from peftkit_kernels.storage.int8 import Int8Weight, quantize_int8
from peftkit_kernels.storage.nf4 import NF4Weight, quantize_nf4
from peftkit_kernels.storage.nf4.weight import LEVELS
from peftkit_kernels.storage.product.config import SmallConfig, nf4_step, small_rows
from peftkit_kernels.storage.product.passes import decodes_in_product, small_m
from peftkit_kernels.storage.quantized import dequantize_reference

N = 29
TRAINED = ("x", "bias", "A", "B")
STORAGES = {
    "nf4": (nf4_linear, quantize_nf4),
    "nf4_nested": (nf4_linear, lambda w: quantize_nf4(w, 32, nested=True)),
    "int8": (int8_linear, quantize_int8),
}
FEW, MANY = 17, 40
every_storage = pytest.mark.parametrize("storage", STORAGES)
every_schedule = pytest.mark.parametrize("rows", [FEW, MANY], ids=["in_product", "before"])


def make(storage, N=N, **options):
    """The op, ``x``, the stored weight and the projection it was made from."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    op, quantize = STORAGES[storage]
    return op, x, quantize(part.weight.float()), part


def leaves_of(x, part):
    return {"x": x, **{name: t for name, t in part.tensors().items() if name != "weight"}}


def run(op, x, q, part, dy):
    y = op(x, q, part.bias, part.lora, backend="triton")
    results = {"y": y.detach()}
    return results | (gradients(y, dy, leaves_of(x, part)) if y.requires_grad else {})


def weight_in_product(q, dtype):
    """What the kernels of few rows multiply with: levels or codes in ``dtype``, times a scale that is applied to sums."""
    if isinstance(q, Int8Weight):
        step = q.row_absmax.double() / 127
        return Bound.of(q.codes.float()) * Bound(step, 2.0**-24 * step, 2.0**-24)[:, None]
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)
    levels = Bound.of(torch.tensor(LEVELS)[codes.long()]).round(dtype)
    absmax = Bound.of(q.absmax)
    if q.nested is not None:
        outer = q.nested.absmax.repeat_interleave(q.nested.blocksize)[: q.absmax.numel()]
        absmax = Bound.of(q.nested.code[q.absmax.long()]) * Bound.of(outer)
        absmax = absmax + Bound.of(q.nested.offset)
    block = torch.arange(codes.numel()) // q.blocksize
    return (levels * absmax[block]).reshape(*q.shape)


def bounds(x, q, part, dy):
    """The bound of every result, where the kernels round."""
    N, K = q.shape
    fused = fuses_gemm(N, K, itemsize=x.element_size(), target=INTERPRETED)
    decoded = Projection(dequantize_reference(q, x.dtype), part.bias, part.lora)
    flat, grads = x.detach().reshape(-1, K), dy.reshape(-1, N)
    bias = None if part.bias is None else Bound.of(part.bias)
    expected = {"bias": Bound.of(grads).sum(0).round(x.dtype)}
    if part.lora is None:
        W = Bound.of(decoded.weight)
        expected["x"] = (Bound.of(grads) @ W).round(x.dtype)
        y = Bound.of(flat) @ W.T if bias is None else bias.addmm(Bound.of(flat), W.T)
        expected["y"] = y.round(x.dtype)
    else:
        linear = Linear(x, decoded, "fused" if fused else "addmm")
        expected |= {"y": linear.forward(), **linear.backward(dy)}
    if decodes_in_product(flat.shape[0], q, INTERPRETED):
        start = bias
        if part.lora is not None:
            start = scaled(linear.narrow_product(linear.s, Bound.of(linear.B).T), part.lora.scale)
            start = start if bias is None else start + bias
        W = weight_in_product(q, x.dtype).T
        y = Bound.of(flat) @ W if start is None else start.addmm(Bound.of(flat), W)
        expected["y"] = y.round(x.dtype)
    return expected


def check(case, dy_layout="contiguous", **watch):
    """Run one case, watched, and compare all of it; returns the names compared."""
    _, x, q, part = case
    dy = output_grad(x, part, dy_layout)
    with watched(**watch) as traffic:
        results = run(*case, dy)
    expected = bounds(x, q, part, dy)
    for name, value in results.items():
        assert value.dtype == (part.lora.A.dtype if name in ("A", "B") else x.dtype)
        expected[name].check(value.reshape(expected[name].value.shape), name)
    kernels = {launch.kernel for launch in traffic.launches}
    few = decodes_in_product(x.shape[:-1].numel(), q, INTERPRETED)
    assert any("small_m" in kernel for kernel in kernels) == few
    return set(results)


@every_storage
@every_schedule
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), MIXED[0]], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, p, rows, storage):
    case = make(storage, x=(rows, 64), dtype=dtype, factors=factors, p=p)
    assert decodes_in_product(rows, case[2], INTERPRETED) == (rows == FEW)
    assert check(case) == {"y", *TRAINED}


@every_storage
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (0, False), (1, False), (64, True)])
@pytest.mark.parametrize("rows", [1, 16, 65])
def test_any_number_of_rows_and_rank(rows, rank, bias, storage):
    names = {"y", "x"} | ({"A", "B"} if rank else set()) | ({"bias"} if bias else set())
    case = make(storage, x=(rows, 64), rank=rank, dtype=torch.bfloat16, bias=bias)
    assert check(case) == names


@every_storage
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_with_more_ranks_than_a_program_holds_the_weight_is_decoded_first(rows, storage):
    op, x, q, part = make(storage, x=(rows, 64), rank=140, dtype=torch.bfloat16)
    weight = dequantize_reference(q, x.dtype)
    with watched() as traffic:
        y = op(x, q, part.bias, part.lora, backend="triton")
    assert not any("small_m" in launch.kernel for launch in traffic.launches)
    linear = Linear(x, Projection(weight, part.bias, part.lora), "addmm")
    linear.forward().check(y, "y")


@every_storage
@pytest.mark.parametrize(("K", "width"), [(1, 1), (7, 130), (33, 3), (192, 65), (301, 7)])
def test_any_width(K, width, storage):
    assert len(check(make(storage, x=(FEW, K), N=width, dtype=torch.float16))) == 5


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_any_blocksize(blocksize, nested):
    case = Shape(x=(FEW, 384), dtype=torch.bfloat16)
    x, part = case.input(), case.projection(N, 384)
    w = part.weight.float()
    w[0, :128], w[1, 5] = 0.0, 100.0
    # blocks of 256 and 512 run across the rows
    q = quantize_nf4(w, blocksize, nested=nested)
    assert decodes_in_product(FEW, q, INTERPRETED)
    assert len(check((nf4_linear, x, q, part))) == 5


@every_storage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout, storage):
    assert len(check(make(storage, x=(2, 5, 64), layout=layout, p=0.1), layout)) == 5


def test_packed_words_that_are_not_aligned_are_decoded_first():
    op, x, q, part = make("nf4", x=(FEW, 64))
    packed = torch.zeros(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed)
    moved = NF4Weight(packed, q.absmax, q.shape, q.blocksize)
    assert not decodes_in_product(FEW, moved, INTERPRETED)
    assert len(check((op, x, moved, part))) == 5


@pytest.mark.parametrize("layout", ["wide_rows", "transposed"])
def test_codes_may_have_any_strides(layout):
    op, x, q, part = make("int8", x=(FEW, 64))
    codes = torch.zeros(N, 70, dtype=torch.int8)[:, 3:67].copy_(q.codes)
    if layout == "transposed":
        codes = torch.zeros(64, 2 * N, dtype=torch.int8).t()[::2].copy_(q.codes)
    dy = output_grad(x, part)
    strided = run(op, x, Int8Weight(codes, q.row_absmax), part, dy)
    for name, value in run(op, x, q, part, dy).items():
        assert torch.equal(value, strided[name]), name


@pytest.mark.parametrize(("storage", "rows"), [("nf4_nested", FEW)])
@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained, storage, rows):
    case = make(storage, x=(rows, 64), trained=trained, p=0.1)
    op, x, q, part = case
    with kept_for_backward(*leaves_of(x.clone(), part).values(), *q.tensors()) as kept:
        y = op(x, q, part.bias, part.lora, backend="triton")
    assert y.requires_grad
    assert kept.total_bytes == 4 * rows * (64 * ("A" in trained) + 4 * ("B" in trained))
    assert check(case) == {"y", *trained}


@every_storage
@pytest.mark.parametrize("rows", [20, MANY], ids=["in_product", "before"])
def test_offsets_of_rows_do_not_overflow(rows, storage):
    case = make(storage, x=(rows, 256), N=88, rank=8, dtype=torch.bfloat16, p=0.1)
    assert len(check(case, int32_limit=INT32_LIMIT)) == 5


@every_storage
@every_schedule
def test_results_do_not_depend_on_the_order_of_programs(rows, storage):
    case = make(storage, x=(rows, 128), N=150, rank=8, dtype=torch.bfloat16, p=0.1)
    dy = output_grad(case[1], case[3])
    assert_same_bits_in_any_order(lambda: tuple(run(*case, dy).values()))


@every_storage
@pytest.mark.parametrize("splits", [1, 3])
def test_a_stored_byte_is_read_once_by_few_rows(storage, splits):
    """Q + x + y + s + B + bias; with several shares of K also float32 partial sums, written and read."""
    K = 1024
    _, x, q, part = make(storage, x=(16, K), N=64, rank=16, dtype=torch.bfloat16)
    s = draw((16, 16), x.dtype, torch.Generator().manual_seed(2))
    step = nf4_step(K, q.blocksize) if isinstance(q, NF4Weight) else 64
    config = SmallConfig(16, 64, step, splits)
    tensors = x, q, part.bias, s, part.lora.B
    with watched(int32_limit=INT32_LIMIT) as traffic, torch.no_grad():
        y = small_m(*tensors, 0.5, config=config)
    first = traffic.launches[0].arguments
    name = "packed_ptr" if isinstance(q, NF4Weight) else "codes_ptr"
    stored = q.tensors()[0]
    assert first[name].load.requested_bytes == first[name].load.unique_bytes == stored.nbytes
    assert first["x_ptr"].load.requested_bytes == x.nbytes
    small = sum(t.nbytes for t in (q.absmax if name == "packed_ptr" else q.row_absmax,))
    if name == "packed_ptr" and q.nested is not None:
        small += q.nested.code[q.absmax.long().unique()].nbytes + q.nested.absmax.nbytes + 4
    streams = sum(t.nbytes for t in (x, stored, part.bias, s, part.lora.B, y))
    steps = -(-(K // step) // splits)
    shares = -(-(K // step) // steps)
    partials = 0 if shares == 1 else 2 * shares * y.numel() * 4
    assert traffic.unique_bytes == streams + small + partials


@every_storage
def test_bytes_of_many_rows_are_those_of_lora_linear_and_a_decoded_weight(storage):
    """README: as ``lora_linear`` in both directions, and twice q read and W written."""
    _, x, q, part = make(storage, x=(MANY, 256), N=64, rank=16, dtype=torch.bfloat16, bias=False)
    dy, lora = output_grad(x, part), part.lora
    stored, call = q.tensors(), steps.Linears(x, [steps.Linear(q, None, lora)])
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is traffic of its own
    with watched() as traffic, EagerTraffic() as torch_ops, torch.no_grad():
        (y,), (s,), _ = step(steps, call)
    decoding = [launch for launch in traffic.launches if launch.kernel == "dequantize_kernel"]
    assert len(decoding) == 2
    W = 64 * 256 * 2
    per_decode = decoding[0].total()
    assert decoding[0].arguments["out_ptr"].store.requested_bytes == W
    assert per_decode - W < 1.2 * sum(t.nbytes for t in stored)
    streams = 3 * x.nbytes + 2 * W + 3 * dy.nbytes + x.nbytes
    small = 6 * s.nbytes + 3 * (lora.A.nbytes + lora.B.nbytes)
    rest = traffic.unique_bytes - 2 * per_decode + torch_ops.unique_bytes
    splits = 4 * 16 * MANY * 2 * _shares(traffic)
    assert rest == streams + small + splits
    assert y.shape == dy.shape


def _shares(traffic):
    """Float32 partial sums of the split shrinks."""
    return sum(
        launch.grid[1] for launch in traffic.launches if launch.kernel == "shrink_kernel"
    ) * any(launch.kernel == "sum_kernel" for launch in traffic.launches)


@pytest.mark.parametrize(
    ("arch", "rows"), [("cuda:80", 64), ("cuda:90", 32), ("cuda:100", 16), ("cuda:89", 128)]
)
def test_where_few_rows_end(arch, rows):
    assert small_rows(64 * 200, target=Target(arch, 132)) == rows
    assert small_rows(64 * 100, target=Target(arch, 132)) == rows // 2
    assert small_rows(64 * 200, target=Target(arch, 132, Calibration(small_m=48))) == 48
    assert small_rows(64 * 200, target=Target(arch, 132, Calibration(small_m=0))) == 0


def test_rows_that_are_not_whole_steps_are_decoded_first():
    assert nf4_step(256, 64) == 64
    assert nf4_step(256, 4096) == 128
    assert nf4_step(96, 64) == 0


def test_a_level_too_far_is_noticed():
    op, x, q, part = make("nf4", x=(FEW, 64), dtype=torch.bfloat16)
    dy = output_grad(x, part)
    expected = bounds(x, q, part, dy)["y"]
    wrong = NF4Weight(q.packed ^ 1, q.absmax, q.shape, q.blocksize)
    with pytest.raises(AssertionError, match="times the error bound"):
        expected.check(run(op, x, wrong, part, dy)["y"])


@pytest.mark.parametrize(("storage", "rows"), [("nf4_nested", MANY), ("int8", FEW)])
def test_opcheck(storage, rows):
    _, x, q, part = make(storage, x=(rows, 64), dtype=torch.bfloat16, factors=torch.float32)
    opcheck(steps, steps.Linears(x, [steps.Linear(q, part.bias, part.lora)]))
