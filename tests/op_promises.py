"""Checks of what every op promises. Each takes a case (``op_cases.Case``) or a function that builds one."""

import op_cases
import pytest
import torch
from torch.utils.checkpoint import checkpoint


def assert_equal(actual, expected):
    """Assert that names and bits are equal."""
    assert actual.keys() == expected.keys()
    assert len(actual) > 1
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def checkpointing_gives_the_same_bits(case, reentrant):
    expected = case.run()

    def call(x):
        return case.at(x=x).outputs()

    outputs = checkpoint(call, case.leaves["x"], use_reentrant=reentrant)
    torch.autograd.backward(outputs, op_cases.weights(outputs))
    actual = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    assert_equal(actual | {name: leaf.grad for name, leaf in case.trained.items()}, expected)


def without_gradients_the_output_is_the_same(case):
    expected = case.outputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = case.outputs()
            if mode is torch.inference_mode:
                copies = {key: leaf.clone() for key, leaf in case.leaves.items()}
                assert copies["x"].is_inference()
                outputs += case.at(**copies).outputs()
        for y, plain in zip(outputs, expected * 2, strict=mode is torch.inference_mode):
            assert not y.requires_grad
            assert torch.equal(y, plain)


def autocast_casts_input_and_weights(case, dtype):
    with torch.autocast("cpu", dtype=dtype):
        actual = case.run()
    frozen = [key for key in case.leaves if key[0] not in "AB"]
    expected = case.to(dtype, frozen).run()
    assert actual["output0"].dtype == dtype
    assert {value.dtype for key, value in actual.items() if key in case.leaves} == {torch.float32}
    assert_equal({key: value.to(expected[key].dtype) for key, value in actual.items()}, expected)


def same_inputs_give_the_same_bits(case):
    expected = case.run()
    assert_equal(case.run(), expected)
    outputs, leaves = case.outputs(), list(case.trained.values())
    for _ in range(2):
        grads = torch.autograd.grad(outputs, leaves, op_cases.weights(outputs), retain_graph=True)
        for key, grad in zip(case.trained, grads, strict=True):
            assert torch.equal(grad, expected[key]), key


def outputs_may_be_changed_in_place(case):
    expected = case.run()
    outputs = case.outputs()
    for y in outputs:
        assert not y._is_view()
        y += 1.0
        y *= 2.0
    actual = case.gradients(outputs)
    for key in case.trained:
        assert torch.equal(actual[key], 2 * expected[key]), key


def inputs_are_left_alone(case):
    before = {key: leaf.detach().clone() for key, leaf in case.leaves.items()}
    outputs = case.outputs()
    grads = op_cases.weights(outputs)
    torch.autograd.grad(outputs, list(case.trained.values()), grads)
    for grad, drawn in zip(grads, op_cases.weights(outputs), strict=True):
        assert torch.equal(grad, drawn)
    for key, leaf in case.leaves.items():
        assert torch.equal(leaf, before[key]), key


def changing_a_kept_tensor_is_noticed(build):
    for key in build().leaves:
        case = build()
        if key.startswith("bias") or key in case.made_from:
            continue
        outputs = case.outputs()
        with torch.no_grad():
            case.leaves[key].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs, case.leaves["x"], op_cases.weights(outputs))


def no_rows_give_empty_outputs_and_zero_gradients(case, leading, **options):
    actual = case.run(**options)
    for key, value in actual.items():
        if key in case.leaves:
            assert value.shape == case.leaves[key].shape
            assert not value.any(), key
        else:
            assert value.shape[:-1] == leading
    assert actual["x"].numel() == 0
