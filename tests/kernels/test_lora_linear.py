"""``lora_linear``: every output and gradient within its running-error bound, and what it keeps, refuses and survives."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    Shape,
    draw,
    explicit,
    gradients,
    input_grad,
    subsets,
)

from lab.testing import Bound, assert_no_worse_than, kept_for_backward
from peftkit_kernels.low_rank import LoRA, unflatten
from peftkit_kernels.ops.lora_linear import lora_linear

N = 29
TRAINED = ("x", "bias", "A", "B")


def make(**options):
    """``x`` and the projection of a case."""
    case = Shape(**options)
    return case.input(), case.projection(N, case.x[-1])


def run(x, part, dy=None, **options):
    """The output and every gradient by name."""
    y = lora_linear(x, part.weight, part.bias, part.lora, **options)
    results = {"y": y.detach()}
    leaves = {"x": x, **part.tensors()}
    if y.requires_grad:
        results |= gradients(y, output_grad(y) if dy is None else dy, leaves)
    return results


def output_grad(y, layout="contiguous"):
    return draw(tuple(y.shape), y.dtype, torch.Generator().manual_seed(1), layout)


def bounds(x, part, dy):
    """The bound of each result of ``run``, in the shape of that result."""
    linear = Linear(Bound.of(x.reshape(-1, x.shape[-1])), part, x.dtype)
    y, rows = linear.forward(), Bound.of(dy.reshape(-1, N))
    grads = linear.backward(rows)
    dx = input_grad([linear], [rows])
    return {"y": y.reshape(*dy.shape), **grads, "x": dx.reshape(*x.shape)}


def check(x, part, dy_layout="contiguous", **options):
    """Run one case and compare all of it; returns the names of what was compared."""
    dy = output_grad(x.new_empty(*x.shape[:-1], N), dy_layout)
    results = run(x, part, dy, **options)
    expected = bounds(x, part, dy)
    for name, value in results.items():
        expected[name].check(value, name)
    return set(results)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, p):
    x, part = make(x=(17, 33), dtype=dtype, factors=factors, bias=bias, p=p)
    names = {"y", "x", "A", "B"} | ({"bias"} if bias else set())
    assert check(x, part) == names


@pytest.mark.parametrize("rank", [1, 4, 16, 24])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 65, 300])
def test_any_number_of_rows_and_rank(rows, rank):
    for dtype, factors in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        assert len(check(*make(x=(rows, 31), rank=rank, dtype=dtype, factors=factors))) == 5


@pytest.mark.parametrize("K", [1, 7, 64, 301])
def test_any_width(K):
    assert len(check(*make(x=(17, K)))) == 5


def test_sizes_that_take_the_library_of_the_processor():
    x, part = make(x=(64, 257), rank=8)
    assert len(check(x, part)) == 5


@pytest.mark.parametrize("shape", [(33,), (2, 33), (2, 3, 33), (2, 3, 2, 33), (2, 0, 33)], ids=str)
def test_leading_axes(shape):
    x, part = make(x=shape)
    results = run(x, part)
    assert results["y"].shape == (*shape[:-1], N)
    assert results["x"].shape == shape
    assert len(check(x, part)) == 5


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_result_gets_its_shape_without_being_a_view(layout):
    values = torch.arange(30.0).view(6, 5)
    y = values.clone() if layout == "contiguous" else values.t().contiguous().t()
    shaped = unflatten(y, torch.Size((2, 3, 7)))
    assert not shaped._is_view()
    assert torch.equal(shaped, values.view(2, 3, 5))


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_offsets(dtype, layout, dy_layout):
    x, part = make(x=(17, 33), dtype=dtype, layout=layout, p=0.1)
    assert x.is_contiguous() == (layout == "contiguous")
    assert len(check(x, part, dy_layout)) == 5


@pytest.mark.parametrize("rows", [5, 65])
@pytest.mark.parametrize("layout", ["transposed", "wide_rows"])
def test_strided_weight(layout, rows):
    x, part = make(x=(rows, 64), weight_layout=layout)
    part.weight = part.weight.T.contiguous().T if layout == "transposed" else part.weight
    assert len(check(x, part)) == 5


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3])
def test_scale(scale):
    results = run(*make(scale=scale))
    assert len(check(*make(scale=scale))) == 5
    if scale == 0.0:
        assert not results["A"].any()
        assert not results["B"].any()


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    for p in (0.0, 0.1):
        x, part = make(trained=trained, p=p)
        results = run(x, part)
        assert results.keys() == {"y", *trained}
        every = run(*make(p=p))
        for name, value in results.items():
            assert torch.equal(value, every[name]), name
        assert check(x, part) == {"y", *trained}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_keep_float32_gradients(dtype):
    x, part = make(x=(300, 33), dtype=dtype, factors=torch.float32)
    grads = run(x, part)
    assert grads["A"].dtype == grads["B"].dtype == torch.float32
    assert grads["x"].dtype == grads["bias"].dtype == dtype
    coarse = grads["B"].to(dtype).float()
    assert not torch.equal(coarse, grads["B"]), "rounded to 16 bits on the way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_autograd(dtype):
    x, part = make(x=(65, 33), dtype=dtype, scale=2.0, p=0.1)
    wide = run(*in_float64(x, part), backend="reference")
    plain, actual = run(x, part, backend="reference"), run(x, part)
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], wide[name], name)


def in_float64(x, part):
    def cast(t):
        return t.detach().double().requires_grad_(t.requires_grad)

    lora = LoRA(cast(part.lora.A), cast(part.lora.B), *part.lora.numbers())
    return cast(x), type(part)(cast(part.weight), cast(part.bias), lora)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_formula(p):
    x, part = make(x=(3, 5), rank=2, dtype=torch.float64, p=p)
    leaves = {"x": x, **part.tensors()}
    y = explicit(x, part)
    expected = {"y": y, **gradients(y, output_grad(y), leaves)}
    actual = run(x, part, backend="reference")
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-14)

    def op(x, bias, A, B):
        return lora_linear(x, part.weight, bias, LoRA(A, B, 0.7, p, 5), backend="reference")

    assert torch.autograd.gradcheck(op, (x, part.bias, part.lora.A, part.lora.B))


def test_dropout_of_everything_leaves_the_frozen_linear():
    x, part = make(p=1.0)
    results = run(x, part)
    expected = torch.nn.functional.linear(x, part.weight, part.bias)
    torch.testing.assert_close(results["y"], expected)
    assert not results["A"].any()
    assert not results["B"].any()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_keeps_what_the_readme_says(trained, p):
    x, part = make(x=(17, 33), trained=trained, p=p)
    with kept_for_backward(*part.tensors().values()) as kept:
        y = lora_linear(x, part.weight, part.bias, part.lora)
    M, K, R = 17, 33, part.lora.A.shape[0]
    assert y.requires_grad
    assert kept.total_bytes == 4 * (M * K * ("A" in trained) + M * R * ("B" in trained))


def test_one_tensor_in_two_places():
    x, _ = make(x=(5, 12))
    square = draw((12, 12), torch.float32, torch.Generator().manual_seed(2)).requires_grad_()
    weight = torch.zeros(12, 12)

    def grad(backend):
        y = lora_linear(x, weight, None, LoRA(square, square, 0.5), backend=backend)
        return torch.autograd.grad(y.square().sum(), square)[0]

    torch.testing.assert_close(grad("torch"), grad("reference"), rtol=1e-4, atol=1e-4)


def change(**tensors):
    x, part = make()
    A, B = tensors.get("A", part.lora.A), tensors.get("B", part.lora.B)
    weight = tensors.get("weight", part.weight)
    bias = tensors.get("bias", part.bias)
    return tensors.get("x", x), weight, bias, LoRA(A, B, 1.0, tensors.get("p", 0.0), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 32)}, r"weight has shape \(29, 33\) and x \(3, 32\); .* must be"),
        ({"x": torch.zeros(())}, r"weight has shape \(29, 33\) and x \(\)"),
        ({"weight": torch.zeros(29)}, r"weight has shape \(29,\)"),
        (
            {"weight": torch.zeros(29, 33, requires_grad=True)},
            r"weight requires a gradient.*requires_grad_\(False\)",
        ),
        ({"bias": torch.zeros(28)}, r"bias has shape \(28,\); .* must be \[29\]"),
        ({"bias": torch.zeros(1)}, r"bias has shape \(1,\)"),
        ({"A": torch.zeros(4, 32)}, r"lora: A \(4, 32\) .* must be \[R, 33\] and \[29, R\]"),
        ({"A": torch.zeros(5, 33)}, r"lora: A \(5, 33\) and B \(29, 4\)"),
        ({"B": torch.zeros(28, 4)}, r"B \(28, 4\)"),
        ({"A": torch.zeros(4, 33).double()}, r"A is torch.float64 and B is torch.float32; keep"),
        ({"p": 1.5}, r"p=1.5 is not a probability; pass"),
        ({"p": -0.1}, r"p=-0.1"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(*change(**arguments))
