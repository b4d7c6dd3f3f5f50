"""``lora_swiglu_mlp``: every output and gradient within its bound, for each activation, and what it keeps."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    activation,
    activation_and_slope,
    explicit,
    gradients,
    input_grad,
    subsets,
)
from mlp_cases import INNER, LINEARS, NAMES, make, named, output_grad, run, tensors

from lab.testing import Bound, assert_no_worse_than, kept_for_backward
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS, lora_swiglu_mlp


def bounds(x, parts, dy, act):
    """The bound of each result of ``run``."""
    dtype = x.dtype
    gate, up = (Linear(Bound.of(x.reshape(-1, x.shape[-1])), part, dtype) for part in parts[:2])
    e, g = gate.forward(), up.forward()
    a, slope = activation_and_slope(e, act)
    a = a.round(dtype)
    down = Linear((a * g).round(dtype), parts[2], dtype)
    expected = {"y": down.forward()}

    dy = Bound.of(dy.reshape(-1, dy.shape[-1]))
    expected |= {f"{name}_down": grad for name, grad in down.backward(dy).items()}
    dh = input_grad([down], [dy])
    de, dg = ((dh * g).round(dtype) * slope).round(dtype), (dh * a).round(dtype)
    for linear, grad, suffix in ((gate, de, "_gate"), (up, dg, "_up")):
        expected |= {name + suffix: value for name, value in linear.backward(grad).items()}
    return expected | {"x": input_grad([gate, up], [de, dg])}


def check(x, parts, act="silu", layout="contiguous"):
    """Run one case and compare all of it; returns the names of what was compared."""
    dy = output_grad(x, layout)
    results, expected = run(x, parts, dy, act), bounds(x, parts, dy, act)
    for name, value in results.items():
        expected[name].check(value.reshape(expected[name].value.shape), name)
    return set(results)


@pytest.mark.parametrize("p", [(0.0,) * 3, (0.1,) * 3, (0.0, 0.5, 1.0)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, act, p):
    x, parts = make(p, dtype=dtype, factors=factors)
    assert check(x, parts, act) == {"x", "y", *NAMES}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_autograd(dtype, act):
    x, parts = make((0.1, 0.0, 0.1), x=(65, 33), dtype=dtype, scale=1.5)
    dy = output_grad(x)
    wide = [
        type(part)(
            *(
                t.detach().double().requires_grad_(t.requires_grad)
                for t in (part.weight, part.bias)
            ),
            LoRA(*(cast(t) for t in (part.lora.A, part.lora.B)), *part.lora.numbers()),
        )
        for part in parts
    ]
    truth = run(cast(x), wide, dy.double(), act, backend="reference")
    plain, actual = run(x, parts, dy, act, backend="reference"), run(x, parts, dy, act)
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], truth[name], name)


def cast(tensor):
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("rank", [1, 16, 24])
@pytest.mark.parametrize("rows", [0, 1, 3, 65, 300])
def test_any_number_of_rows_and_rank(rows, rank):
    assert len(check(*make(x=(rows, 31), rank=rank))) == 11
    assert len(check(*make(x=(rows, 31), rank=rank, dtype=torch.bfloat16))) == 11


@pytest.mark.parametrize("biased", [(), ("_up",)], ids=str)
@pytest.mark.parametrize("adapted", [(), *subsets(LINEARS)], ids=str)
def test_any_linear_may_lack_an_adapter_or_a_bias(adapted, biased):
    x, parts = make((0.1, 0.0, 0.1), adapted, biased)
    assert len(check(x, parts)) == 2 + len(biased) + 2 * len(adapted)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("trained", subsets(("x", "A_gate", "B_up", "A_down", "bias_gate")))
def test_each_subset_of_trained_tensors(trained, act):
    x, parts = make((0.1, 0.0, 0.0), trained=trained)
    assert check(x, parts, act) == {"y", *trained}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    x, parts = make((0.0, 0.1, 0.1), layout=layout)
    assert len(check(x, parts, layout=layout)) == 11


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_scale(scale):
    assert len(check(*make(scale=scale))) == 11


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_reference_is_the_formula(act):
    x, parts = make((0.0, 0.3, 0.3), x=(3, 5), dtype=torch.float64)
    gate, up, down = parts
    y = explicit(activation(explicit(x, gate), act) * explicit(x, up), down)
    dy = output_grad(x)
    expected = {"y": y.detach(), **gradients(y, dy, named(x, parts))}
    actual = run(x, parts, dy, act, backend="reference")
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("trained", subsets(("x", "A_up", "A_down", "B_down")), ids="-".join)
def test_keeps_what_the_readme_says(trained, p):
    x, parts = make((p,) * 3, trained=trained)
    with kept_for_backward(*(t for part in parts for t in part.tensors().values())) as kept:
        y = lora_swiglu_mlp(x, *tensors(parts))
    assert y.requires_grad
    M, D, R = 17, 33, parts[0].lora.A.shape[0]
    only_down = trained == ("B_down",)
    kept_of_rows = D * ("A_up" in trained) + (0 if only_down else 2 * INNER + 2 * R)
    assert kept.total_bytes == 4 * M * (kept_of_rows + R * ("B_down" in trained))


@pytest.mark.parametrize("value", [1e3, -1e3, 1e18, -1e18])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_far_ends_of_the_activations(act, value):
    """Gates that are fully open or shut: the value itself or nothing, and no overflow on the way."""
    x = torch.ones(2, 1, requires_grad=True)
    weights = (torch.full((3, 1), value), torch.ones(3, 1), torch.ones(1, 3))
    y = lora_swiglu_mlp(x, weights, (None,) * 3, (None,) * 3, act)
    open_gate = 3 * max(value, 0.0)
    torch.testing.assert_close(y, torch.full((2, 1), open_gate))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full((2, 1), 2 * open_gate))


def change(i, **tensors_of):
    x, parts = make()
    part = parts[i]
    lora = LoRA(tensors_of.get("A", part.lora.A), tensors_of.get("B", part.lora.B), 1.0)
    parts[i] = type(part)(tensors_of.get("weight", part.weight), part.bias, lora)
    return x, *tensors(parts)


@pytest.mark.parametrize(
    ("i", "arguments", "message"),
    [
        (0, {"weight": torch.zeros(21, 32)}, r"weights\[0\] \(gate\) has shape \(21, 32\)"),
        (1, {"weight": torch.zeros(33)}, r"weights\[1\] \(up\) has shape \(33,\)"),
        (1, {"weight": torch.zeros(20, 33)}, r"up \(20, 33\) .* must be \[F, D\]"),
        (2, {"weight": torch.zeros(33, 20)}, r"down \(33, 20\)"),
        (2, {"weight": torch.zeros(33)}, r"down \(33,\)"),
        (0, {"weight": torch.zeros(21, 33, requires_grad=True)}, r"\(gate\) requires a gradient"),
        (2, {"weight": torch.zeros(33, 21, requires_grad=True)}, r"\(down\) requires a gradient"),
        (2, {"A": torch.zeros(4, 33)}, r"loras\[2\]: A \(4, 33\)"),
    ],
)
def test_errors_name_the_argument(i, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_swiglu_mlp(*change(i, **arguments))


def test_what_does_not_form_an_mlp_is_refused():
    x, weights, biases, loras = change(0)
    with pytest.raises(ValueError, match="act='relu' is unknown; use one of silu"):
        lora_swiglu_mlp(x, weights, biases, loras, "relu")
    with pytest.raises(ValueError, match=r"2 loras.*; pass one of each"):
        lora_swiglu_mlp(x, weights, biases, loras[:2])
    with pytest.raises(ValueError, match=r"biases\[2\] has shape \(21,\); .* must be \[33\]"):
        lora_swiglu_mlp(x, weights, biases[:1] * 3, loras)
    with pytest.raises(ValueError, match="2 weights; a gated MLP has three"):
        lora_swiglu_mlp(x, weights[:2], biases[:2], loras[:2])
