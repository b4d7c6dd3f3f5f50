"""``lora_qkv``: every output and gradient within its bound, whatever the projections have and whichever outputs are used."""

import pytest
import torch
from lora_cases import DTYPES, LAYOUTS, MIXED, Linear, Shape, draw, explicit, input_grad, subsets

from lab.testing import Bound, kept_for_backward
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv

WIDTHS = (29, 12, 12)
NAMES = tuple(f"{tensor}{i}" for i in range(3) for tensor in ("bias", "A", "B"))


def make(adapted=(0, 1, 2), biased=(0, 1, 2), p=(0.0, 0.0, 0.0), ranks=(4, 4, 4), **options):
    """``x`` and the projections of a case; options as ``Shape``."""
    case = Shape(**({"x": (17, 33)} | options))
    x, parts = case.input(), []
    for i, N in enumerate(WIDTHS):
        case.p, case.bias, case.rank = p[i], i in biased, ranks[i] if i in adapted else 0
        parts.append(case.projection(N, case.x[-1], str(i)))
    return x, parts


def named(x, parts):
    leaves = {"x": x}
    for i, part in enumerate(parts):
        leaves |= {f"{name}{i}": tensor for name, tensor in part.tensors().items()}
    return leaves


def output_grads(x, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    return [draw((*x.shape[:-1], N), x.dtype, generator, layout) for N in WIDTHS]


def run(x, parts, dys, used=(0, 1, 2), **options):
    """Outputs, and the gradients that the outputs in ``used`` give; ``None`` where none arrives."""
    tensors = zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)
    ys = lora_qkv(x, *tensors, **options)
    wanted = {name: leaf for name, leaf in named(x, parts).items() if leaf.requires_grad}
    outputs = [ys[i] for i in used if ys[i].requires_grad]
    grads = [dys[i] for i in used if ys[i].requires_grad]
    values = torch.autograd.grad(outputs, list(wanted.values()), grads, allow_unused=True)
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return results | dict(zip(wanted, values, strict=True))


def bounds(x, parts, dys, used=(0, 1, 2)):
    """The bound of each result of ``run``."""
    rows = Bound.of(x.reshape(-1, x.shape[-1]))
    linears = [Linear(rows, part, x.dtype) for part in parts]
    expected = {f"y{i}": linear.forward() for i, linear in enumerate(linears)}
    dys = [Bound.of(dy.reshape(-1, dy.shape[-1])) for dy in dys]
    for i in used:
        grads = linears[i].backward(dys[i])
        expected |= {f"{name}{i}": grad for name, grad in grads.items()}
    expected["x"] = input_grad([linears[i] for i in used], [dys[i] for i in used])
    return expected


def check(x, parts, used=(0, 1, 2), layout="contiguous"):
    """Run one case and compare all of it; returns the names of what was compared."""
    dys = output_grads(x, layout)
    results = run(x, parts, dys, used)
    expected = bounds(x, parts, dys, used)
    compared = set()
    for name, value in results.items():
        if value is None:
            assert name not in expected, name
            continue
        bound = expected[name]
        bound.check(value.reshape(bound.value.shape), name)
        compared.add(name)
    return compared


@pytest.mark.parametrize("p", [(0.0,) * 3, (0.1,) * 3, (0.0, 0.5, 1.0)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, p):
    x, parts = make(dtype=dtype, factors=factors, p=p)
    assert check(x, parts) == {"x", "y0", "y1", "y2", *NAMES}


@pytest.mark.parametrize("rows", [0, 1, 3, 65])
@pytest.mark.parametrize("ranks", [(1, 4, 24), (16, 16, 16)], ids=str)
def test_any_number_of_rows_and_ranks(rows, ranks):
    assert len(check(*make(x=(rows, 31), ranks=ranks))) == 13
    assert len(check(*make(x=(rows, 31), ranks=ranks, dtype=torch.bfloat16))) == 13


@pytest.mark.parametrize("biased", [(), (0, 2)], ids=str)
@pytest.mark.parametrize("adapted", [(), *subsets(range(3))], ids=str)
def test_any_projection_may_lack_an_adapter_or_a_bias(adapted, biased):
    x, parts = make(adapted, biased, p=(0.0, 0.1, 0.0))
    assert len(check(x, parts)) == 4 + len(biased) + 2 * len(adapted)


@pytest.mark.parametrize("p", [(0.0,) * 3, (0.0, 0.5, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("used", subsets(range(3)), ids=str)
def test_any_of_the_outputs_may_be_used(used, p):
    x, parts = make(p=p)
    compared = check(x, parts, used)
    assert compared == {"x", "y0", "y1", "y2", *(n for n in NAMES if int(n[-1]) in used)}


@pytest.mark.parametrize("trained", subsets(("x", "A0", "B1", "bias2")), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    x, parts = make(trained=trained, p=(0.0, 0.1, 0.0))
    assert check(x, parts) == {"y0", "y1", "y2", *trained}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    x, parts = make(layout=layout, p=(0.0, 0.1, 0.0))
    assert len(check(x, parts, layout=layout)) == 13


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_scale(scale):
    assert len(check(*make(scale=scale))) == 13


def test_each_output_is_that_of_lora_linear():
    x, parts = make(dtype=torch.float64, p=(0.1, 0.0, 0.5))
    results = run(x, parts, output_grads(x))
    for i, part in enumerate(parts):
        y = lora_linear(x, part.weight, part.bias, part.lora)
        torch.testing.assert_close(results[f"y{i}"], y.detach(), rtol=1e-13, atol=1e-13)


def test_reference_is_the_formula():
    x, parts = make(x=(3, 5), dtype=torch.float64, p=(0.0, 0.3, 0.0), ranks=(1, 2, 2))
    leaves = {name: leaf for name, leaf in named(x, parts).items() if leaf.requires_grad}
    ys = [explicit(x, part) for part in parts]
    grads = torch.autograd.grad(ys, list(leaves.values()), output_grads(x))
    actual = run(x, parts, output_grads(x), backend="reference")
    for i, y in enumerate(ys):
        torch.testing.assert_close(actual[f"y{i}"], y.detach(), rtol=1e-13, atol=1e-13)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(actual[name], grad, rtol=1e-13, atol=1e-13)


def test_one_adapter_on_two_projections():
    x, parts = make()
    parts[2] = type(parts[2])(parts[2].weight, None, parts[1].lora)
    shared = parts[1].lora

    def grads(backend):
        tensors = zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)
        ys = lora_qkv(x, *tensors, backend=backend)
        return torch.autograd.grad(ys, (shared.A, shared.B), output_grads(x))

    torch.testing.assert_close(grads("torch"), grads("reference"), rtol=1e-4, atol=1e-4)


def test_outputs_are_separate_tensors():
    x, parts = make(biased=())
    tensors = zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)
    ys = lora_qkv(x, *tensors)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 3


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("needs_B", [True, False])
@pytest.mark.parametrize("needs_A", [True, False])
def test_keeps_what_the_readme_says(needs_A, needs_B, p):
    trained = ("x", *["A1"] * needs_A, *["B2"] * needs_B)
    x, parts = make(trained=trained, p=(p,) * 3)
    weights = [tensor for part in parts for tensor in part.tensors().values()]
    with kept_for_backward(*weights) as kept:
        tensors = zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)
        ys = lora_qkv(x, *tensors)
    assert len(ys) == 3
    M, K, ranks = 17, 33, 3 * 4
    assert kept.total_bytes == 4 * (M * K * needs_A + M * ranks * needs_B)


def change(i, **tensors):
    x, parts = make()
    part = parts[i]
    lora = LoRA(tensors.get("A", part.lora.A), tensors.get("B", part.lora.B), 1.0)
    parts[i] = type(part)(tensors.get("weight", part.weight), part.bias, lora)
    return x, *zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)


@pytest.mark.parametrize(
    ("i", "arguments", "message"),
    [
        (1, {"weight": torch.zeros(12, 32)}, r"weights\[1\] has shape \(12, 32\)"),
        (2, {"weight": torch.zeros(12, 33, requires_grad=True)}, r"weights\[2\] requires a grad"),
        (0, {"A": torch.zeros(4, 32)}, r"loras\[0\]: A \(4, 32\)"),
        (1, {"B": torch.zeros(12, 4).double()}, r"loras\[1\]: .*torch.float64; keep"),
    ],
)
def test_errors_name_the_argument(i, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_qkv(*change(i, **arguments))


@pytest.mark.parametrize("short", ["weights", "biases", "loras"])
def test_lists_that_do_not_fit_are_refused(short):
    x, *lists = change(0)
    named = dict(zip(("weights", "biases", "loras"), lists, strict=True))
    named[short] = named[short][:2]
    with pytest.raises(ValueError, match=f"2 {short}.*; pass one of each"):
        lora_qkv(x, **named)
    named[short] = lists[("weights", "biases", "loras").index(short)]
    named["biases"] = named["biases"][:1] * 3
    with pytest.raises(ValueError, match=r"biases\[1\] has shape \(29,\); .* must be \[12\]"):
        lora_qkv(x, **named)
