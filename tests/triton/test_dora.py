"""``dora_norm`` and ``dora_linear`` by Triton: bounds on dense, NF4 and 8-bit weights, one read of the weight, gradients."""

import pytest
import torch
from lora_cases import LAYOUTS, MIXED, Projection, Shape, draw, gradients, subsets
from markers import slow_if
from triton_cases import (
    DTYPES,
    INT32_LIMIT,
    assert_same_bits_in_any_order,
    opcheck,
    scaled,
    watched,
)
from triton_cases import draw as normal
from triton_linear import Linear, output_grad

from lab.testing import UNIT_ROUNDOFF, Bound, kept_for_backward
from peftkit_kernels.core.launch import INTERPRETED
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.low_rank.config import fuses_gemm
from peftkit_kernels.ops.dora import dora_linear, dora_norm, norm_schedule, schedule
from peftkit_kernels.ops.dora.config import MagnitudeConfig, NormConfig
from peftkit_kernels.ops.dora.passes import magnitude_grad, weight_norm
from peftkit_kernels.ops.dora.schedule import folds
from peftkit_kernels.storage.int8 import Int8Weight, quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import dequantize_reference, tensors_of

N = 29
TRAINED = ("x", "bias", "A", "B", "magnitude")
STORAGES = {
    "dense": lambda w: w,
    "nf4": lambda w: quantize_nf4(w.float()),
    "nf4_nested": lambda w: quantize_nf4(w.float(), 32, nested=True),
    "int8": lambda w: quantize_int8(w.float()),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


def float32(tensor):
    """A bound of float32 values that were made without error."""
    return Bound(tensor.double(), torch.zeros_like(tensor.double()), UNIT_ROUNDOFF[torch.float32])


def norm_bound(weight, lora):
    """Of ``weight_norm``: products with a 16-bit A are 16-bit, unless the weight is wider; codes are exact in any dtype."""
    A, B = lora.A.detach(), lora.B.detach()
    dtype, step = A.dtype, None
    if isinstance(weight, torch.Tensor):
        dtype = torch.promote_types(dtype, weight.dtype)
        full = operand = float32(weight.float())
    elif isinstance(weight, Int8Weight):
        full = operand = float32(weight.codes.float())
        row = weight.row_absmax.double() / 127
        step = Bound(row, 2.0**-24 * row, full.unit)
    else:
        values = float32(dequantize_reference(weight, torch.float32))
        # its own roundings of level times absmax are those of the definition
        full, operand = values, values.round(dtype)
    squares = (full * full).sum(1)
    cross = operand @ Bound.of(A).T
    if step is not None:
        squares, cross = squares * (step * step), cross * step[:, None]
    b = Bound.of(B)
    gram = Bound.of(A.float()) @ Bound.of(A.float()).T
    update = ((b @ gram) * b).sum(1)
    scale = Bound.of(torch.tensor(lora.scale, dtype=torch.float64)).round(torch.float32)
    scale = Bound(scale.value, scale.error, full.unit)
    square = Bound.of(torch.tensor(lora.scale**2, dtype=torch.float64)).round(torch.float32)
    square = Bound(square.value, square.error, full.unit)
    squares = squares + (cross * b).sum(1) * (scale * 2.0) + update * square
    smallest = (squares.value - squares.error).clamp(min=1e-30)
    return squares.map(lambda v: v.clamp(min=0).sqrt(), 0.5 / smallest.sqrt(), 1.0)


def adapter(rows, K, rank, dtype, scale=-0.7):
    A = normal(rank, K, dtype=dtype) / K**0.5
    return LoRA(A, normal(rows, rank, dtype=dtype) / rank**0.5, scale)


@every_storage
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, d) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("rows", "K", "rank"), [(29, 33, 4), (17, 136, 64), (9, 40, 200)])
def test_norm(rows, K, rank, dtype, factors, storage):
    weight = STORAGES[storage](normal(rows, K, dtype=dtype) / K**0.5)
    lora = adapter(rows, K, rank, factors)
    expected = norm_bound(weight, lora)
    with watched():
        actual = dora_norm(weight, lora, backend="triton")
    assert actual.dtype == torch.float32
    expected.check(actual, "norm")
    with watched():
        small = weight_norm(weight, lora.A, lora.B, lora.scale, config=NormConfig(16, 16))
    expected.check(small, "norm in small tiles")


@pytest.mark.parametrize("storage", ["dense", "nf4_nested"])
@pytest.mark.parametrize(("rows", "K", "rank"), [(1, 1, 1), (70, 72, 16)])
def test_norm_of_any_size(rows, K, rank, storage):
    weight = STORAGES[storage](normal(rows, K) / K**0.5)
    lora = adapter(rows, K, rank, torch.float32)
    norm_bound(weight, lora).check(dora_norm(weight, lora, backend="triton"))


@pytest.mark.parametrize("layout", ["transposed", "wide_rows"])
@pytest.mark.parametrize("storage", ["dense", "int8"])
def test_norm_of_strided_weights(layout, storage):
    w = draw((29, 33), torch.float32, torch.Generator().manual_seed(0), layout)
    lora = adapter(29, 33, 4, torch.float32)
    weight = w
    if storage == "int8":
        q = quantize_int8(w)
        codes = torch.zeros(33, 58, dtype=torch.int8).t()[::2].copy_(q.codes)
        weight = Int8Weight(codes, q.row_absmax)
    with watched():
        norm_bound(weight, lora).check(dora_norm(weight, lora, backend="triton"))


def test_a_norm_that_cancels_is_zero_and_nan_stays():
    A, B = normal(2, 33), normal(N, 2)
    weight = -(B @ A)
    weight[3, 5] = torch.nan
    norm = dora_norm(weight, LoRA(A, B, 1.0), backend="triton")
    assert norm.isnan().nonzero().flatten().tolist() == [3]
    # of a square that large only its rounding is left
    allowed = (33 * 2.0**-22) ** 0.5 * (B @ A).norm(dim=1)
    good = torch.arange(N) != 3
    assert ((norm >= 0) & (norm <= allowed))[good].all()


@every_storage
def test_a_weight_is_read_once(storage):
    weight = STORAGES[storage](normal(64, 256, dtype=torch.bfloat16))
    lora = adapter(64, 256, 16, torch.bfloat16)
    with watched(int32_limit=INT32_LIMIT) as traffic:
        weight_norm(weight, lora.A, lora.B, lora.scale)
    (launch,) = traffic.launches
    read = launch.arguments["w_ptr"].load
    stored = tensors_of([weight])
    assert read.requested_bytes == read.unique_bytes == read.sector_bytes == stored[0].nbytes
    small = sum(t.nbytes for t in (lora.A, lora.B)) + 2 * 4 * 64
    scales = sum(t.nbytes for t in stored[1:2])
    if storage == "nf4_nested":
        used = weight.nested.code[weight.absmax.long().unique()].nbytes
        scales += used + weight.nested.absmax.nbytes + 4
    assert launch.total() == stored[0].nbytes + scales + small


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (70, 88)], ids=str)
def test_magnitude_grad(shape, bias, dtype):
    dy, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype) * 2
    shift = normal(shape[1], dtype=dtype) if bias else None
    magnitude = normal(shape[1]).abs() + 0.5
    part = Bound.of(y) if shift is None else Bound.of(y) - Bound.of(shift)
    total = (part * Bound.of(dy)).sum(0) * (1 / magnitude.double())
    for config in (None, MagnitudeConfig(16, 32, 32)):
        with watched(int32_limit=INT32_LIMIT) as traffic:
            actual = magnitude_grad(dy, y, shift, magnitude, magnitude.dtype, config=config)
        total.check(actual, "dmagnitude")
        launch = traffic.launches[0].arguments
        for name, tensor in (("dy_ptr", dy), ("y_ptr", y)):
            assert launch[name].load.requested_bytes == tensor.nbytes


def make(storage="dense", N=N, **options):
    """The weight, the leaves by name and the numbers of the adapter."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    magnitude = draw((N,), part.lora.A.dtype, case.generator).abs() + 0.5
    leaves = {"x": x, "A": part.lora.A, "B": part.lora.B}
    leaves["magnitude"] = magnitude.requires_grad_(case.trains("magnitude"))
    if part.bias is not None:
        leaves["bias"] = part.bias
    return STORAGES[storage](part.weight), leaves, part.lora.numbers()


def run(case, dy, **options):
    weight, leaves, numbers = case
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    tensors = leaves["x"], weight, leaves.get("bias"), lora, leaves["magnitude"]
    y = dora_linear(*tensors, **{"backend": "triton"} | options)
    return {"y": y.detach()} | (gradients(y, dy, leaves) if y.requires_grad else {})


def bounds(case, dy, norm, y):
    """Of every result, given the norm and, for the magnitude's gradient, the output that were really computed."""
    weight, leaves, numbers = case
    x, bias = leaves["x"].detach(), leaves.get("bias")
    dtype, scale, p, seed = x.dtype, *numbers
    A, B, magnitude = (leaves[name].detach() for name in ("A", "B", "magnitude"))
    rows, N, K = x.shape[:-1].numel(), *weight.shape
    g = magnitude.float() / norm
    dense = isinstance(weight, torch.Tensor)
    keeps = (
        torch.promote_types(dtype, A.dtype) is not dtype
    )  # the direction, and then nothing is folded
    folded = folds(rows, weight) and not keeps
    if dense:
        W = Bound.of(weight.to(dtype))
        if folded:
            W = (W * g[:, None]).round(dtype)
    else:
        W = Bound.of(dequantize_reference(weight, dtype, None if keeps else g))
    schedule = "fused"
    if not fuses_gemm(N, K, itemsize=x.element_size(), target=INTERPRETED):
        schedule = "addmm"
    wide = torch.promote_types(dtype, A.dtype)
    factor = (B * g[:, None]).to(wide)
    shift = None if bias is None or not folded else bias.detach()
    part = Projection(torch.empty(N, K), shift, LoRA(A, factor if folded else B, *numbers))
    linear = Linear(x, part, schedule)
    linear.factors = A.dtype
    flat, grads = x.reshape(-1, K), dy.reshape(-1, N)
    update = scaled(linear.narrow_product(linear.s, Bound.of(linear.B).T), scale)
    z = linear.project(Bound.of(flat), W.T, update, None if shift is None else Bound.of(shift))
    direction = z
    if not folded:
        z = z * g if bias is None else z * g + Bound.of(bias)
        z = z.round(dtype)
    linear.B, linear.part = factor, part
    part.lora = LoRA(A, factor, *numbers)
    expected = linear.backward(dy.to(dtype))
    ds = scaled(Bound.of(grads) @ Bound.of(factor), scale).round(wide)
    dx_update = scaled(linear.narrow_product(ds, Bound.of(linear.A)), 1.0, p)
    if p:
        from peftkit_kernels.core.dropout import dropout_mask

        dx_update = dx_update * dropout_mask(*dx_update.value.shape, p, seed)
    left = Bound.of(grads)
    if not folded:
        left = (left * g).round(dtype)
    dB = scaled(Bound.of(grads).T @ linear.s, scale).round(torch.float32)
    spread = Bound.of(y.reshape(-1, N))
    spread = spread if bias is None else spread - Bound.of(bias)
    total = (spread * Bound.of(grads)).sum(0) * (1 / magnitude.double())
    if keeps:
        total = (direction * Bound.of(grads)).sum(0) * (1 / norm.double())
    return expected | {
        "y": z,
        "x": linear.project(left, W, dx_update),
        "B": (dB * g[:, None]).round(B.dtype),
        "magnitude": total.round(magnitude.dtype),
    }


def check(case, layout="contiguous", **watch):
    weight, leaves, numbers = case
    x = leaves["x"]
    dy = draw((*x.shape[:-1], weight.shape[0]), x.dtype, torch.Generator().manual_seed(1), layout)
    lora = LoRA(leaves["A"].detach(), leaves["B"].detach(), *numbers)
    with watched(**watch):
        norm = dora_norm(weight, lora, backend="triton")
        results = run(case, dy, norm=norm)
    expected = bounds(case, dy, norm, results["y"])
    for name, value in results.items():
        assert value.dtype == (leaves[name].dtype if name in leaves else x.dtype)
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return set(results)


@every_storage
@pytest.mark.parametrize("rows", [9, 40], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, rows, storage):
    case = make(storage, x=(rows, 33), dtype=dtype, factors=factors, p=0.1)
    dense_and_exact = rows == 40 and dtype.itemsize >= 4
    assert folds(rows, case[0]) == (storage != "dense" or dense_and_exact)
    assert check(case) == {"y", *TRAINED}


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("rank", [1, 64, 130])
@pytest.mark.parametrize("K", [7, 64])
def test_any_width_and_rank(K, rank, storage):
    assert len(check(make(storage, x=(17, K), rank=rank, bias=False))) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout):
    assert len(check(make(x=(2, 5, 33), layout=layout), layout)) == 6


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    case = make("nf4", x=(17, 33), trained=trained)
    weight, leaves, numbers = case
    with kept_for_backward(*leaves.values(), *weight.tensors()) as kept:
        lora = LoRA(leaves["A"], leaves["B"], *numbers)
        y = dora_linear(
            *(leaves["x"] * 1, weight, leaves["bias"], lora, leaves["magnitude"]),
            backend="triton",
        )
    assert y.requires_grad
    sizes = {"A": 17 * 33, "B": 17 * 4, "magnitude": 17 * N}
    assert kept.total_bytes == 4 * (N + sum(sizes.get(name, 0) for name in trained))
    assert check(case) == {"y", *trained}


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_offsets_of_rows_do_not_overflow(storage):
    case = make(storage, x=(70, 80), N=88, rank=8, dtype=torch.bfloat16, p=0.1)
    assert len(check(case, int32_limit=INT32_LIMIT)) == 6


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_results_do_not_depend_on_the_order_of_programs(storage):
    case = make(storage, x=(130, 72), N=150, rank=8, dtype=torch.bfloat16, p=0.1)
    dy = output_grad(case[1]["x"], Projection(torch.empty(150, 72), None, None))
    assert_same_bits_in_any_order(lambda: tuple(run(case, dy).values()))


def test_a_change_of_the_output_is_noticed():
    weight, leaves, numbers = make()
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    y = dora_linear(leaves["x"], weight, None, lora, leaves["magnitude"], backend="triton")
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_float64_weights_are_refused_by_name():
    lora = adapter(29, 33, 4, torch.float32)
    with pytest.raises(ValueError, match=r"backend=.triton.: dora_norm .*torch.float64"):
        dora_norm(normal(29, 33).double(), lora, backend="triton")


@pytest.mark.parametrize("storage", slow_if("dense".__ne__, ["dense", "nf4_nested"]))
def test_opcheck(storage):
    weight, leaves, numbers = make(
        storage, x=(3, 33), dtype=torch.bfloat16, factors=torch.float32, p=0.1
    )
    lora, norm = LoRA(leaves["A"], leaves["B"], *numbers), torch.ones(N)
    factors = lora.A.detach(), lora.B.detach()
    opcheck(norm_schedule, norm_schedule.UpdatedWeight(weight, *factors, lora.scale))
    for bias, keep_direction in ((leaves["bias"], False), (leaves["bias"], True), (None, False)):
        arguments = leaves["x"], weight, bias, lora, leaves["magnitude"], norm
        opcheck(schedule, schedule.DoRA(*arguments, keep_direction))
