"""What every op promises alike, kept by its Triton kernels too: modes of autograd, autocast, in-place use, compilation."""

import op_cases
import pytest
import torch
from torch.utils.checkpoint import checkpoint

NAMES = (
    "lora_linear",
    "lora_qkv",
    "lora_swiglu_mlp",
    "bottleneck",
    "frozen_rms_norm",
    "frozen_layer_norm",
    "nf4_linear",
    "int8_linear",
    "int8_compute_linear",
    "dora_linear",
)
every_op = pytest.mark.parametrize("name", NAMES)


class Case(op_cases.Case):
    """A case whose op runs on Triton."""

    def outputs(self, **options):
        return super().outputs(**({"backend": "triton"} | options))


def build(name, **options):
    if name in op_cases.LORA_NAMES:
        options = {"p": 0.1} | options
    case = op_cases.build(name, **options)
    return Case(case.leaves, case.apply)


def assert_equal(actual, expected):
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
        return case.apply(case.leaves | {"x": x}, backend="triton")

    outputs = checkpoint(call, case.leaves["x"], use_reentrant=reentrant)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, op_cases.weights(outputs))
    actual = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    assert_equal(actual | {name: leaf.grad for name, leaf in case.trained.items()}, expected)


@every_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(name, mode):
    case = build(name)
    expected = case.outputs()
    with mode():
        for y, plain in zip(case.outputs(), expected, strict=True):
            assert not y.requires_grad
            assert torch.equal(y, plain)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_input_and_weights(name, dtype):
    if name not in op_cases.LORA_NAMES:
        return
    case = build(name)
    with torch.autocast("cpu", dtype=dtype):
        actual = case.run()
    frozen = [key for key in case.leaves if key[0] not in "AB"]
    narrow = case.to(dtype, frozen)
    expected = narrow.run()
    assert actual["output0"].dtype == dtype
    assert_equal({key: value.to(expected[key].dtype) for key, value in actual.items()}, expected)


@every_op
def test_same_inputs_give_the_same_bits(name):
    case = build(name)
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
    case.run()
    for key, leaf in case.leaves.items():
        assert torch.equal(leaf, before[key]), key


@every_op
def test_second_derivative_raises(name):
    case = build(name)
    loss = sum(y.square().sum() for y in case.outputs())
    (dx,) = torch.autograd.grad(loss, case.leaves["x"], create_graph=True)
    folder = "quantized_linear" if name in ("nf4_linear", "int8_linear") else name
    with pytest.raises(RuntimeError, match=f"^{folder} is once_differentiable"):
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
    assert torch.equal(actual["output0"].isfinite().all(1), torch.arange(9) != 2)


@every_op
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["float32", "bfloat16_base"])
def test_compiled_without_graph_break(name, factors):
    dtype = torch.float32 if factors is None else torch.bfloat16
    case = build(name, dtype=dtype, factors=factors)
    expected = case.run()
    torch.compiler.reset()
    compiled = torch.compile(case.apply, backend="aot_eager", fullgraph=True)
    assert_equal(Case(case.leaves, compiled).run(), expected)


@every_op
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_no_rows(name, leading):
    case = build(name, leading=leading)
    for key, value in case.run().items():
        if key in case.leaves:
            assert value.shape == case.leaves[key].shape
            assert not value.any(), key
        else:
            assert value.shape[:-1] == leading


@every_op
def test_what_triton_cannot_compute_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"backend='triton'.*float64; the kernels compute in.*use"):
        build(name, dtype=torch.float64).outputs()


@pytest.mark.parametrize("name", [name for name in NAMES if name in op_cases.LORA_NAMES])
def test_ranks_beyond_the_registers_are_refused(name):
    with pytest.raises(ValueError, match=r"the rank is 129; the kernels keep .* up to 128"):
        build(name, rank=129).outputs()
