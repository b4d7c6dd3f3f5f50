"""What every op promises alike: modes of autograd, autocast, in-place use, equal bits, compilation, no rows."""

import op_cases
import op_promises
import pytest
import torch
from markers import slow_if
from torch.autograd import forward_ad

from peftkit_kernels.ops.attention import attention

every_op = pytest.mark.parametrize("name", op_cases.NAMES)
lora_op = pytest.mark.parametrize("name", op_cases.LORA_NAMES)


def build(name, **options):
    """A case with dropout where the op has any."""
    return op_cases.build(
        name, **({"p": 0.1} | options if name in op_cases.LORA_NAMES else options)
    )


@every_op
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_gives_the_same_bits(name, reentrant):
    op_promises.checkpointing_gives_the_same_bits(build(name), reentrant)


@every_op
def test_without_gradients_the_output_is_the_same(name):
    op_promises.without_gradients_the_output_is_the_same(build(name))


# torch scripts its decompositions when the first tangent is made
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_op
def test_forward_mode_is_refused_without_gradients_too(name):
    case = build(name)
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(case.leaves["x"], torch.ones_like(case.leaves["x"]))
        with pytest.raises(RuntimeError, match="jvp"):
            case.apply(case.leaves | {"x": x}, backend="torch")


@every_op
def test_transforms_are_refused_without_gradients_too(name):
    case = build(name, leading=(3,))
    two = case.leaves["x"].detach().expand(2, -1, -1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: case.apply(case.leaves | {"x": x}, backend="torch"))(two)


@pytest.mark.parametrize("name", [name for name in op_cases.NAMES if name != "int8_compute_linear"])
def test_transforms_take_the_definition(name):
    """All but the one that rounds, which has no derivative but its own."""
    case = op_cases.build(name, leading=(3,), dtype=torch.float64)
    trained = {key: leaf.detach() for key, leaf in case.trained.items()}

    weights = op_cases.weights(case.outputs())

    def total(leaves, index):
        outputs = case.at(**leaves).outputs()
        return (index + 1) * sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))

    expected = case.run(backend="reference")
    each = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(trained, torch.arange(2))
    for key in trained:
        for factor, actual in zip((1, 2), each[key], strict=True):
            torch.testing.assert_close(actual, factor * expected[key], rtol=1e-12, atol=1e-12)


@lora_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_input_and_weights(name, dtype):
    op_promises.autocast_casts_input_and_weights(build(name), dtype)


@every_op
def test_autocast_leaves_float64_alone(name):
    case = build(name, dtype=torch.float64)
    expected = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op_promises.assert_equal(case.run(), expected)


@every_op
def test_same_inputs_give_the_same_bits(name):
    op_promises.same_inputs_give_the_same_bits(build(name, leading=(65,)))


@every_op
def test_outputs_may_be_changed_in_place(name):
    op_promises.outputs_may_be_changed_in_place(build(name))


@every_op
def test_inputs_are_left_alone(name):
    op_promises.inputs_are_left_alone(build(name))


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
    op_promises.changing_a_kept_tensor_is_noticed(lambda: build(name))


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
@pytest.mark.parametrize("name", slow_if(op_cases.LARGE_NAMES.__contains__, op_cases.NAMES))
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
    op_promises.no_rows_give_empty_outputs_and_zero_gradients(case, leading, backend=backend)


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
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"backend='triton': .*has no Triton kernel.*use backend="):
        attention(q, q, q, 0.5, backend="triton")
