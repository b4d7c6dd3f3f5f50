"""``dora_norm`` and ``dora_linear`` on dense, NF4 and 8-bit weights."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    Projection,
    Shape,
    draw,
    gradients,
    subsets,
)
from markers import slow_if

from lab.testing import Bound, Made, kept_for_backward
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.dora import dora_linear, dora_linear_reference, dora_norm, torch_passes
from peftkit_kernels.ops.dora.schedule import folds
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import dequantize_reference, tensors_of

N = 29
TRAINED = ("x", "bias", "A", "B", "magnitude")
STORAGES = {
    "dense": lambda w: w,
    "nf4": lambda w: quantize_nf4(w.float(), nested=True),
    "int8": lambda w: quantize_int8(w.float()),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


def make(storage="dense", trained=None, **options):
    """The weight, the leaves by name and the numbers of the adapter."""
    case = Shape(trained=trained, **options)
    x, part = case.input(), case.projection(N, case.x[-1])
    weight = STORAGES[storage](part.weight)
    magnitude = draw((N,), part.lora.A.dtype, case.generator).abs() + 0.5
    leaves = {"x": x, "A": part.lora.A, "B": part.lora.B}
    leaves["magnitude"] = magnitude.requires_grad_(case.trains("magnitude"))
    if part.bias is not None:
        leaves["bias"] = part.bias
    return weight, leaves, part.lora.numbers()


def apply(weight, leaves, numbers, op=dora_linear, **options):
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    return op(leaves["x"], weight, leaves.get("bias"), lora, leaves["magnitude"], **options)


def run(case, dy=None, **options):
    y = apply(*case, **options)
    if dy is None:
        dy = draw(tuple(y.shape), y.dtype, torch.Generator().manual_seed(1))
    return {"y": y.detach()} | (gradients(y, dy.to(y.dtype), case[1]) if y.requires_grad else {})


def full_weight(weight, dtype):
    """What the weight stands for: a stored one decoded in the dtype its norm is computed in."""
    return weight if isinstance(weight, torch.Tensor) else dequantize_reference(weight, dtype)


def norm_bound(weight, lora):
    """The norms as ``dora_norm`` sums them."""
    W, A, B = Bound.of(weight), Bound.of(lora.A), Bound.of(lora.B)
    cross = ((W @ A.T) * B).sum(1) * (2 * lora.scale)
    squares = (W * W).sum(1) + cross + ((B @ (A @ A.T)) * B).sum(1) * lora.scale**2
    smallest = (squares.value - squares.error).clamp(min=1e-30)
    return squares.map(torch.sqrt, 0.5 / smallest.sqrt(), 1.0)


def column(bound):
    return bound.reshape(-1, 1)


def expected(case, dy):
    """Bounds by name in the roundings of the torch schedule."""
    weight, leaves, numbers = case
    x, bias, dtype = leaves["x"].detach(), leaves.get("bias"), leaves["x"].dtype
    lora = LoRA(leaves["A"].detach(), leaves["B"].detach(), *numbers)
    wide = torch.promote_types(dtype, torch.float32)
    W = full_weight(weight, wide)
    norm, magnitude = norm_bound(W, lora), Bound.of(leaves["magnitude"])
    smallest = norm.value - norm.error
    g = magnitude * norm.map(torch.reciprocal, smallest**-2, 0.0)
    linear = Linear(Bound.of(x.flatten(0, -2)), Projection(W, None, lora), dtype)
    keeps = linear.wide is not dtype  # the direction, and then nothing is folded
    folded = folds(x.shape[:-1].numel(), weight) and not keeps
    dy, W = Bound.of(dy.flatten(0, -2)), linear.weight
    if not isinstance(weight, torch.Tensor) and not folded:
        W = W.round(dtype)
    if folded:
        W = (W * column(g)).round(dtype)
    s = (linear.drop(linear.x) @ linear.A.T).round(linear.wide)
    scaled_B = (Bound.of(lora.B) * column(g)).round(wide)
    shift = Bound.of(torch.zeros(N, dtype=dtype) if bias is None else bias)
    if folded:
        y = shift.addmm(linear.x, W.T).round(dtype)
        y = y.addmm(s, scaled_B.round(linear.wide).T, lora.scale).round(dtype)
        dx = (dy @ W).round(dtype)
    else:
        y = (linear.x @ W.T).round(dtype).addmm(s, linear.B.T, lora.scale)
        direction = y = y.round(dtype) if keeps else y
        y = (y * g + shift).round(dtype)
        dx = ((dy * g).round(dtype) @ W).round(dtype)
    linear.ds = ((dy @ scaled_B).round(wide) * lora.scale).round(wide)
    inverse = magnitude.map(torch.reciprocal, magnitude.value**-2, 0.0)
    bounds = {
        "y": y,
        "x": linear.add_update(dx),
        "A": linear.ds.T @ linear.drop(linear.x),
        "B": (dy.T @ s) * lora.scale * column(g),
        "magnitude": ((y - shift) * dy).sum(0) * inverse,
        "bias": dy.sum(0),
    }
    if keeps:
        bounds["magnitude"] = (direction * dy).sum(0) * norm.map(
            torch.reciprocal, smallest**-2, 0.0
        )
    stored = {name: leaf.dtype for name, leaf in leaves.items()} | {"y": dtype}
    return {name: bounds[name].round(stored[name]) for name in stored}


def check(case, layout="contiguous"):
    _, leaves, _ = case
    x = leaves["x"]
    dy = draw((*x.shape[:-1], N), x.dtype, torch.Generator().manual_seed(1), layout)
    actual, bounds = run(case, dy), expected(case, dy)
    assert actual.keys() == bounds.keys()
    for name, value in actual.items():
        assert value.dtype == (leaves[name].dtype if name in leaves else x.dtype)
        bounds[name].check(value.reshape(bounds[name].value.shape), name)
    return set(actual)


@every_storage
@pytest.mark.parametrize("rows", [9, 40], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(storage, dtype, factors, rows):
    case = make(storage, x=(rows, 33), dtype=dtype, factors=factors, p=0.1)
    dense_and_exact = rows == 40 and dtype.itemsize >= 4
    assert folds(rows, case[0]) == (storage != "dense" or dense_and_exact)
    assert check(case) == {"y", *TRAINED}


@every_storage
@pytest.mark.parametrize("rank", [1, 16, 24])
@pytest.mark.parametrize("K", [7, 64, 301])
def test_any_width_and_rank(storage, K, rank):
    check(make(storage, x=(17, K), rank=rank))
    check(make(storage, x=(17, K), rank=rank, bias=False))


@every_storage
def test_a_width_of_one(storage):
    # the norm of a single sum that cancels has no digits left: everything else has
    weight, leaves, numbers = make(storage, x=(17, 1))
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    norm = dora_norm(weight, lora, backend="reference")
    actual, expected = (
        run((weight, leaves, numbers), norm=norm, backend=b) for b in ("torch", "reference")
    )
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    check(make(x=(2, 5, 33), layout=layout, weight_layout="wide_rows"), layout)


@every_storage
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_rows(storage, backend):
    results = run(make(storage, x=(0, 33)), backend=backend)
    assert results["y"].shape == (0, N)
    assert not results["magnitude"].any()


@every_storage
@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(storage, trained):
    every, case = run(make(storage, x=(17, 33))), make(storage, x=(17, 33), trained=trained)
    actual = run(case)
    assert actual.keys() == {"y", *trained}
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    weight, leaves, numbers = case
    with kept_for_backward(*leaves.values(), *tensors_of([weight])) as kept:
        y = apply(weight, leaves | {"x": leaves["x"] * 1}, numbers)
    assert y.requires_grad
    sizes = {"A": 17 * 33, "B": 17 * 4, "magnitude": 17 * N}
    assert kept.total_bytes == 4 * (N + sum(sizes.get(name, 0) for name in trained))


@every_storage
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (29, 33), (300, 70)], ids=str)
def test_norm_within_the_error_bound(storage, dtype, shape):
    rows, K = shape
    generator = torch.Generator().manual_seed(0)
    weight = STORAGES[storage](draw(shape, dtype, generator))
    lora = LoRA(draw((4, K), dtype, generator), draw((rows, 4), dtype, generator), -0.7)
    wide = torch.promote_types(dtype, torch.float32)
    full = full_weight(weight, wide)
    norm = norm_bound(full, lora)
    actual = dora_norm(weight, lora)
    assert actual.dtype == wide
    norm.check(actual, "norm")
    exact = torch.linalg.vector_norm(
        full.double() + lora.scale * lora.B.double() @ lora.A.double(), dim=1
    )
    torch.testing.assert_close(norm.value, exact)
    norm.check(dora_norm(weight, lora, backend="reference"), "norm of the reference")
    assert not actual.requires_grad


def test_a_norm_that_cancels_is_not_negative():
    A, B = torch.randn(2, 33), torch.randn(N, 2)
    norm = dora_norm(-(B @ A), LoRA(A.requires_grad_(), B, 1.0))
    # of a square that large only its rounding is left
    allowed = (33 * 2.0**-22) ** 0.5 * (B @ A).norm(dim=1)
    assert ((norm >= 0) & (norm <= allowed)).all()


@every_storage
def test_gradients_of_the_reference(storage):
    weight, leaves, numbers = make(storage, x=(3, 5), rank=2, dtype=torch.float64, p=0.3)
    norm = dora_norm(weight, LoRA(leaves["A"], leaves["B"], *numbers))

    def op(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return apply(weight, named, numbers, norm=norm, backend="reference")

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


def test_at_the_start_it_is_the_frozen_linear():
    weight, leaves, numbers = make(x=(9, 33))
    with torch.no_grad():
        leaves["B"].zero_()
    leaves["magnitude"] = torch.linalg.vector_norm(weight, dim=1)
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    expected = lora_linear(leaves["x"], weight, leaves["bias"], lora)
    torch.testing.assert_close(apply(weight, leaves, numbers), expected)


@every_storage
def test_a_norm_that_is_given_is_used(storage):
    weight, leaves, numbers = make(storage)
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    norm = dora_norm(weight, lora)
    plain = apply(weight, leaves, numbers)
    assert torch.equal(apply(weight, leaves, numbers, norm=norm), plain)
    doubled = apply(weight, leaves | {"bias": None}, numbers, norm=norm / 2)
    assert torch.equal(doubled, 2 * apply(weight, leaves | {"bias": None}, numbers, norm=norm))


@every_storage
def test_modes_repetition_and_refusals(storage):
    case = make(storage, x=(9, 33))
    weight, leaves, numbers = case
    first, again = run(case), run(case)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.inference_mode():
        assert torch.equal(apply(*case), first["y"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = apply(*case)
    assert half.dtype is torch.bfloat16
    cast = leaves | {"x": leaves["x"].bfloat16(), "bias": leaves["bias"].bfloat16()}
    assert torch.equal(half, apply(weight, cast, numbers))
    (dx,) = torch.autograd.grad(apply(*case).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear is once_differentiable"):
        dx.sum().backward()
    y = apply(*case)
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("storage", slow_if("dense".__ne__, STORAGES))
def test_compiled_without_graph_break(storage):
    weight, leaves, numbers = make(storage, dtype=torch.float64)

    def op(**tensors):
        return apply(weight, tensors, numbers)

    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**leaves), op(**leaves))


def test_nothing_of_the_size_of_the_weight_is_made(monkeypatch):
    monkeypatch.setattr(torch_passes, "_NORM_ROWS", 8)
    K = 2048
    weight, leaves, numbers = make("nf4", x=(3, K), rank=2, trained=("A", "B", "magnitude"))
    apply(weight, leaves, numbers)  # the workspace is there now
    with Made() as made:
        apply(weight, leaves, numbers)
    big = [size for size in made.storages.values() if size >= 4 * N * K]
    assert len(big) == 1, "the workspace and nothing else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnitude": torch.zeros(28)}, r"magnitude has shape \(28,\); .* must be \[29\]"),
        ({"bias": torch.zeros(28)}, r"bias has shape \(28,\)"),
        ({"x": torch.zeros(3, 32)}, r"weight has shape \(29, 33\) and x \(3, 32\)"),
        ({"A": torch.zeros(4, 32)}, r"lora: A \(4, 32\)"),
    ],
)
@every_storage
def test_errors_name_the_argument(storage, change, message):
    weight, leaves, numbers = make(storage)
    with pytest.raises(ValueError, match=message):
        apply(weight, leaves | change, numbers)


def test_errors_name_the_norm_and_the_weight():
    weight, leaves, numbers = make()
    with pytest.raises(ValueError, match=r"norm has shape \(28,\)"):
        apply(weight, leaves, numbers, norm=torch.ones(28))
    with pytest.raises(ValueError, match=r"norm requires a gradient.*norm.detach\(\)"):
        apply(weight, leaves, numbers, norm=torch.ones(N, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight requires a gradient"):
        apply(weight.clone().requires_grad_(), leaves, numbers)
    with pytest.raises(ValueError, match=r"weight has shape \(29,\); it must be \[N, K\]"):
        dora_norm(torch.ones(29), LoRA(leaves["A"], leaves["B"], 1.0))


def test_the_definition_without_a_norm_treats_it_as_a_constant():
    weight, leaves, numbers = make(dtype=torch.float64)
    lora = LoRA(leaves["A"], leaves["B"], *numbers)
    args = leaves["x"], weight, leaves["bias"], lora, leaves["magnitude"]
    implicit = dora_linear_reference(*args)
    explicit = dora_linear_reference(*args, dora_norm(weight, lora, backend="reference"))
    grads = [torch.autograd.grad(y.sum(), leaves["B"])[0] for y in (implicit, explicit)]
    torch.testing.assert_close(grads[0], grads[1])
