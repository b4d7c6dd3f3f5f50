"""``dora_scale`` and ``dora_gate``: within the error bound of every element, and what all ops promise."""

import op_cases
import pytest
import torch
import torch.nn.functional as F
from dora_scale_cases import TRAINED, N, apply, bounds, gate_bounds, gate_case, leaves, results
from lora_cases import DTYPES, LAYOUTS, MIXED, draw, subsets

from lab.testing import kept_for_backward
from peftkit_kernels import native
from peftkit_kernels.core import recompute
from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_gate_reference, dora_scale
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "own"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_every_element_is_within_its_bound(dtype, own, layout):
    tensors = leaves(dtype, own, layout=layout)
    dy = draw((3, 5, N), dtype, torch.Generator().manual_seed(1), layout)
    actual = results(tensors, dy)
    definition = results(tensors, dy, backend="reference")
    for name, bound in bounds(tensors, dy).items():
        bound.check(actual[name].reshape(bound.value.shape), name)
        assert actual[name].dtype == (tensors[name].dtype if name in tensors else dtype)
        if dtype.itemsize > 2 or name == "y":  # autograd sums the definition's gradients in 16 bits
            bound.check(definition[name].reshape(bound.value.shape), name)


@pytest.mark.parametrize("rows", [1, 64, 65, 300])
def test_sums_over_many_rows(rows):
    tensors = leaves(leading=(rows,))
    dy = draw((rows, N), torch.float32, torch.Generator().manual_seed(1))
    actual = results(tensors, dy)
    for name, bound in bounds(tensors, dy).items():
        bound.check(actual[name], name)


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    dy = draw((3, 5, N), torch.float32, torch.Generator().manual_seed(1))
    every, tensors = results(leaves(), dy), leaves(trained=trained)
    actual = results(tensors, dy)
    assert actual.keys() == {"y", *trained}
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name
    with kept_for_backward(*tensors.values()) as kept:
        y = apply(tensors | {"z": tensors["z"] * 1})
    assert y.requires_grad
    assert kept.total_bytes == 4 * N * (1 + 15 * ("magnitude" in trained))


def test_absent_parts():
    tensors = leaves(torch.float64)
    z, magnitude, norm, bias = tensors.values()
    assert torch.equal(dora_scale(z, Scale(None, None, None)), z)
    assert torch.equal(dora_scale(z, Scale(None, None, bias)), z + bias)
    torch.testing.assert_close(
        dora_scale(z, Scale(magnitude, norm, None)), z * magnitude / norm, rtol=1e-15, atol=1e-15
    )
    plain = dora_scale(z, Scale(None, None, None))
    plain += 1.0
    assert not torch.equal(plain, z), "an output of its own"


def test_gradients_of_the_definition():
    tensors = leaves(torch.float64, leading=(3,))
    _, _, norm, _ = tensors.values()

    def op(z, magnitude, bias):
        return dora_scale(z, Scale(magnitude, norm, bias), backend="reference")

    z, magnitude, _, bias = tensors.values()
    assert torch.autograd.gradcheck(op, (z, magnitude, bias))


@pytest.mark.parametrize("magnitudes", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gate_and_gradients_within_the_bound(act, magnitudes):
    case, norms = gate_case(act, magnitudes=magnitudes)
    actual = case.run()
    (dh,) = op_cases.weights([actual["output0"]])
    expected = gate_bounds(case.leaves, norms, dh, act)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        expected[name].check(value, name)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gate_is_the_definition_in_float64(act):
    case, _ = gate_case(act, torch.float64, leading=(2, 3))
    assert torch.autograd.gradcheck(
        lambda *t: case.apply(dict(zip(case.leaves, t, strict=True)), backend="reference"),
        tuple(case.leaves.values()),
    )
    actual, expected = case.run(), case.run(backend="reference")
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_what_consumes_the_gate_makes_it_again_instead_of_keeping_it():
    case, _ = gate_case("silu")
    h = case.apply(case.leaves)
    make, ingredients = recompute.saved_for(h, True)
    assert make is not None
    with torch.no_grad():
        case.leaves["magnitude_e"].mul_(2.0)
        assert torch.equal(recompute.restore(make, ingredients), h), "as it was in this forward"
    with kept_for_backward(*case.leaves.values()) as kept:
        h = case.apply({name: leaf * 1 for name, leaf in case.leaves.items()})
    assert h.requires_grad
    assert kept.total_bytes == 4 * N * (2 * 17 + 6), "two z, two factors, two norms, two biases"


@pytest.mark.parametrize("gated", [False, True], ids=["scale", "gate"])
def test_modes_and_repetition(gated):
    if gated:
        case, _ = gate_case("silu")
    else:
        tensors = leaves()
        norm = tensors.pop("norm")

        def op(named, **options):
            scale = Scale(named["magnitude"], norm, named["bias"])
            return dora_scale(named["z"], scale, **options)

        case = op_cases.Case(tensors, op)
    first = case.run()
    for name, value in case.run().items():
        assert torch.equal(value, first[name]), name
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (y,) = case.outputs()
        assert torch.equal(y, first["output0"])
        assert not y.requires_grad
    z = next(iter(case.trained.values()))
    (dz,) = torch.autograd.grad(case.outputs()[0].square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="is once_differentiable"):
        dz.sum().backward()
    y = case.outputs()[0]
    y *= 2.0
    twice = torch.autograd.grad(y, z, op_cases.weights([y]))[0]
    assert torch.equal(twice, 2 * first[next(iter(case.trained))])
    torch.compiler.reset()
    compiled = torch.compile(case.apply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.leaves), first["output0"])
    empty = {name: t[:0] if name[0] == "z" else t for name, t in case.leaves.items()}
    grads = torch.autograd.grad(
        case.apply(empty).sum(), case.leaves["bias" if not gated else "bias_e"]
    )
    assert not grads[0].any()


def test_native_and_torch_passes_agree(monkeypatch):
    tensors, dy = leaves(), draw((3, 5, N), torch.float32, torch.Generator().manual_seed(1))
    by_default = results(tensors, dy)
    monkeypatch.setattr(native, "supports", lambda *tensors: False)
    by_torch = results(tensors, dy)
    for name, bound in bounds(tensors, dy).items():
        bound.check(by_torch[name].reshape(bound.value.shape), name)
        bound.check(by_default[name].reshape(bound.value.shape), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"magnitude": torch.zeros(28)},
            r"scale.magnitude has shape \(28,\); for z .* must be \[29\]",
        ),
        ({"bias": torch.zeros(28)}, r"scale.bias has shape \(28,\)"),
        ({"norm": None}, "scale has only a magnitude or only a norm"),
        ({"norm": torch.ones(29, requires_grad=True)}, r"norm requires a gradient.*norm.detach"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        apply(leaves() | change)


def test_errors_of_the_gate():
    case, _ = gate_case("silu")
    z = case.leaves["z_e"]
    with pytest.raises(ValueError, match="act='relu' is unknown"):
        dora_gate((z, z), (Scale(None, None, None),) * 2, "relu")
    with pytest.raises(ValueError, match="pass two of each"):
        dora_gate((z, z[1:]), (Scale(None, None, None),) * 2)
    with pytest.raises(ValueError, match=r"scales\[1\].bias has shape"):
        dora_gate((z, z), (Scale(None, None, None), Scale(None, None, z[0, 1:])))
    wide = Scale(z[0], torch.ones(N, dtype=torch.float64), None)
    with pytest.raises(
        ValueError, match=r"dora_gate .*: one of its tensors is torch.float64; the kernels"
    ):
        dora_gate((z, z), (Scale(None, None, None), wide), backend="triton")


def test_the_definition_of_the_gate():
    generator = torch.Generator().manual_seed(0)
    e, u = (draw((3, N), torch.float64, generator) for _ in range(2))
    h = dora_gate_reference((e, u), (Scale(None, None, None),) * 2, "silu")
    assert torch.equal(h, F.silu(e) * u)
