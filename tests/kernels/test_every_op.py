"""What every op promises alike: modes of autograd, autocast, in-place use, equal bits, compilation, no rows."""

import op_cases
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from peftkit_kernels.dora_scale import Scale, dora_scale

every_op = pytest.mark.parametrize("name", op_cases.NAMES)
lora_op = pytest.mark.parametrize("name", op_cases.LORA_NAMES)


def build(name, **options):
    """A case with dropout where the op has any."""
    return op_cases.build(
        name, **({"p": 0.1} | options if name in op_cases.LORA_NAMES else options)
    )


def assert_equal(actual, expected):
    """The same names and bits."""
    assert actual.keys() == expected.keys()
    assert len(actual) > 1
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@every_op
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_gives_the_same_bits(name, reentrant):
    case = build(name)
    expected = case.run()

    def call(x):
        return case.apply(case.leaves | {"x": x})

    outputs = checkpoint(call, case.leaves["x"], use_reentrant=reentrant)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, op_cases.weights(outputs))
    actual = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    assert_equal(actual | {name: leaf.grad for name, leaf in case.trained.items()}, expected)


@every_op
def test_without_gradients_the_output_is_the_same(name):
    case = build(name)
    expected = case.outputs()
    modes = torch.no_grad, torch.inference_mode
    for mode in modes:
        with mode():
            outputs = case.outputs()
            if mode is torch.inference_mode:
                copies = {key: leaf.clone() for key, leaf in case.leaves.items()}
                assert copies["x"].is_inference()
                outputs += op_cases.Case(copies, case.apply).outputs()
        for y, plain in zip(outputs, expected * 2, strict=mode is torch.inference_mode):
            assert not y.requires_grad
            assert torch.equal(y, plain)


# torch scripts its decompositions when the first tangent is made
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_op
def test_forward_mode_is_refused_without_gradients_too(name):
    case = build(name)
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(case.leaves["x"], torch.ones_like(case.leaves["x"]))
        with pytest.raises(RuntimeError, match="jvp"):
            case.apply(case.leaves | {"x": x})


@every_op
def test_transforms_are_refused_without_gradients_too(name):
    case = build(name, leading=(3,))
    two = case.leaves["x"].detach().expand(2, -1, -1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: case.apply(case.leaves | {"x": x}))(two)


@lora_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_input_and_weights(name, dtype):
    case = build(name)
    with torch.autocast("cpu", dtype=dtype):
        actual = case.run()
    frozen = [key for key in case.leaves if key[0] not in "AB"]
    expected = case.to(dtype, frozen).run()
    assert actual["output0"].dtype == dtype
    assert {value.dtype for key, value in actual.items() if key in case.leaves} == {torch.float32}
    assert_equal({key: value.to(expected[key].dtype) for key, value in actual.items()}, expected)


@every_op
def test_autocast_leaves_float64_alone(name):
    case = build(name, dtype=torch.float64)
    expected = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(case.run(), expected)


@every_op
def test_same_inputs_give_the_same_bits(name):
    case = build(name, leading=(65,))
    expected = case.run()
    assert_equal(case.run(), expected)
    outputs, leaves = case.outputs(), list(case.trained.values())
    for _ in range(2):
        grads = torch.autograd.grad(outputs, leaves, op_cases.weights(outputs), retain_graph=True)
        for key, grad in zip(case.trained, grads, strict=True):
            assert torch.equal(grad, expected[key]), key


@every_op
def test_outputs_may_be_changed_in_place(name):
    case = build(name)
    expected = case.run()
    outputs = case.outputs()
    for y in outputs:
        assert not y._is_view()
        y += 1.0
        y *= 2.0
    actual = case.gradients(outputs)
    for key in case.trained:
        assert torch.equal(actual[key], 2 * expected[key]), key


@every_op
def test_inputs_are_left_alone(name):
    case = build(name)
    before = {key: leaf.detach().clone() for key, leaf in case.leaves.items()}
    outputs = case.outputs()
    grads = op_cases.weights(outputs)
    torch.autograd.grad(outputs, list(case.trained.values()), grads)
    for grad, drawn in zip(grads, op_cases.weights(outputs), strict=True):
        assert torch.equal(grad, drawn)
    for key, leaf in case.leaves.items():
        assert torch.equal(leaf, before[key]), key


@every_op
def test_second_derivative_raises(name):
    case = build(name)
    sums = [sum(y.square().sum() for y in case.outputs(backend=b)) for b in ("torch", "reference")]
    x = case.leaves["x"]
    dx, expected = (torch.autograd.grad(loss, x, create_graph=True)[0] for loss in sums)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)
    expected.sum().backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_op
def test_changing_a_kept_tensor_is_noticed(name):
    for key in build(name).leaves:
        case = build(name)
        if key.startswith("bias"):
            continue
        outputs = case.outputs()
        with torch.no_grad():
            case.leaves[key].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs, case.leaves["x"], op_cases.weights(outputs))


@every_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_only(name, bad):
    case = build(name, leading=(9,))
    with torch.no_grad():
        case.leaves["x"][2, 1] = bad
    actual = case.run()
    broken = [key for key in actual if key.startswith("output")]
    broken += [] if name in op_cases.LINEAR_NAMES else ["x"]
    assert "output0" in broken
    for key in broken:
        assert torch.equal(actual[key].isfinite().all(1), torch.arange(9) != 2), key


# torch's compiler makes an instance of an autograd function, which warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_op
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["float64", "bfloat16_base"])
def test_compiled_without_graph_break(name, factors):
    dtype = torch.float64 if factors is None else torch.bfloat16
    case = op_cases.build(name, dtype=dtype, factors=factors)
    torch.compiler.reset()
    compiled = torch.compile(case.apply, backend="aot_eager", fullgraph=True)
    actual = op_cases.Case(case.leaves, compiled).run()
    expected = case.run(backend="reference")
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@every_op
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(name, backend, leading):
    case = build(name, leading=leading)
    actual = case.run(backend=backend)
    for key, value in actual.items():
        if key in case.leaves:
            assert value.shape == case.leaves[key].shape
            assert not value.any(), key
        else:
            assert value.shape[:-1] == leading
    assert actual["x"].numel() == 0


@every_op
@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 2)], ids=str)
def test_leading_axes(name, leading):
    case = build(name, leading=leading, dtype=torch.float64)
    actual = case.run()
    rows = case.leaves["x"].detach().reshape(-1, op_cases.WIDTH).requires_grad_()
    flat = op_cases.Case(case.leaves | {"x": rows}, case.apply).run()
    for key, value in actual.items():
        assert value.shape[:-1] == leading or key in case.leaves
        torch.testing.assert_close(
            value.reshape(flat[key].shape), flat[key], rtol=1e-13, atol=1e-13
        )


@every_op
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; use one of auto, reference"):
        build(name).outputs(backend="cuda")


def test_an_op_without_triton_kernel_says_so():
    z, scale = torch.ones(2, 3), Scale(torch.ones(3), torch.ones(3), None)
    with pytest.raises(ValueError, match=r"backend='triton': .*has no Triton kernel.*use backend="):
        dora_scale(z, scale, backend="triton")
