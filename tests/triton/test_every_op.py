"""What every op promises alike, kept by its Triton kernels too: modes of autograd, autocast, in-place use, compilation."""

import op_cases
import op_promises
import pytest
import torch
from markers import slow_if

from peftkit_kernels.core.plan import Plans
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv import lora_qkv

NAMES = (
    "lora_linear",
    "lora_qkv",
    "lora_swiglu_mlp",
    "bottleneck",
    "frozen_rms_norm",
    "frozen_layer_norm",
    "nf4_linear",
    "int8_linear",
    "fp8_linear",
    "int8_compute_linear",
    "dora_linear",
    "dora_scale",
    "dora_gate",
)
every_op = pytest.mark.parametrize("name", NAMES)
lora_op = pytest.mark.parametrize("name", [name for name in NAMES if name in op_cases.LORA_NAMES])


class Case(op_cases.Case):
    """A case whose op runs on Triton."""

    def outputs(self, **options):
        return super().outputs(**({"backend": "triton"} | options))


def build(name, **options):
    if name in op_cases.LORA_NAMES:
        options = {"p": 0.1} | options
    case = op_cases.build(name, **options)
    return Case(case.leaves, case.apply, case.made_from)


@every_op
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_gives_the_same_bits(name, reentrant):
    op_promises.checkpointing_gives_the_same_bits(build(name), reentrant)


@every_op
def test_without_gradients_the_output_is_the_same(name):
    op_promises.without_gradients_the_output_is_the_same(build(name))


@lora_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_input_and_weights(name, dtype):
    op_promises.autocast_casts_input_and_weights(build(name), dtype)


@every_op
def test_same_inputs_give_the_same_bits(name):
    op_promises.same_inputs_give_the_same_bits(build(name))


@every_op
def test_outputs_may_be_changed_in_place(name):
    op_promises.outputs_may_be_changed_in_place(build(name))


@every_op
def test_inputs_are_left_alone(name):
    op_promises.inputs_are_left_alone(build(name))


@every_op
def test_a_replayed_plan_equals_the_schedule_for_other_values(name, monkeypatch):
    case = build(name)
    case.run()
    for leaf in case.leaves.values():
        leaf.data = torch.randn(leaf.shape).to(leaf.dtype)
    with monkeypatch.context() as patched:
        patched.setattr(Plans, "_record", None)
        replayed = case.run()
    monkeypatch.setattr(Plans, "__call__", lambda self, *args: self._schedule(*args))
    op_promises.assert_equal(replayed, case.run())


def test_a_replayed_plan_uses_the_seeds_of_its_call(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 17, generator=generator)
    weights = [torch.randn(8, 17, generator=generator) for _ in range(2)]
    factors = [(torch.randn(4, 17), torch.randn(8, 4)) for _ in range(2)]

    def run(*seeds):
        loras = [LoRA(A, B, 2.0, 0.5, seed) for (A, B), seed in zip(factors, seeds, strict=True)]
        return lora_qkv(x, weights, [None, None], loras, backend="triton")

    calls = [(1, 2), (3, 4), (5, 5), (6, 6), (2, 1)]
    planned = [run(*seeds) for seeds in calls]
    monkeypatch.setattr(Plans, "__call__", lambda self, *args: self._schedule(*args))
    for seeds, found in zip(calls, planned, strict=True):
        for actual, expected in zip(found, run(*seeds), strict=True):
            assert torch.equal(actual, expected)
    assert not torch.equal(planned[0][0], planned[1][0])


@every_op
def test_second_derivative_raises(name):
    case = build(name)
    loss = sum(y.square().sum() for y in case.outputs())
    (dx,) = torch.autograd.grad(loss, case.leaves["x"], create_graph=True)
    linear = ("lora_qkv", "nf4_linear", "int8_linear", "fp8_linear", "int8_compute_linear")
    schedule = "lora_linear" if name in linear else name
    with pytest.raises(RuntimeError, match=f"^{schedule} is once_differentiable"):
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
    assert torch.equal(actual["output0"].isfinite().all(1), torch.arange(9) != 2)


@pytest.mark.parametrize("name", slow_if(op_cases.LARGE_NAMES.__contains__, NAMES))
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["float32", "bfloat16_base"])
def test_compiled_without_graph_break(name, factors):
    dtype = torch.float32 if factors is None else torch.bfloat16
    case = build(name, dtype=dtype, factors=factors)
    expected = case.run()
    torch.compiler.reset()
    compiled = torch.compile(case.apply, backend="aot_eager", fullgraph=True)
    op_promises.assert_equal(Case(case.leaves, compiled).run(), expected)


@every_op
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_no_rows(name, leading):
    case = build(name, leading=leading)
    op_promises.no_rows_give_empty_outputs_and_zero_gradients(case, leading)


@every_op
def test_what_triton_cannot_compute_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"backend='triton'.*float64; the kernels compute in.*use"):
        build(name, dtype=torch.float64).outputs()


@lora_op
def test_ranks_beyond_what_the_kernels_compute_are_refused(name):
    with pytest.raises(ValueError, match="the rank is 513; its kernels compute up to 512"):
        build(name, rank=513).outputs()
