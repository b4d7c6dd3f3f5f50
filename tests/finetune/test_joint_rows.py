"""Joint batches: rows are put together and divided again, each with its own adapter, or there is an error."""

import psutil
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peftkit import ContractError
from peftkit.finetune.together.conductor import FORWARD, Conductor
from peftkit.finetune.together.passes import pays
from peftkit.finetune.together.places import Route, Routed
from peftkit.finetune.together.rows import batch_rows, divided, stacked
from peftkit_kernels.low_rank import LoRA


def test_both_ways_of_updating_rows_give_the_same_outputs_and_gradients():
    draw = torch.Generator().manual_seed(0)
    route = Route()
    route.set([(0, 2), (1, 1), (2, 3)])
    leaves = [torch.randn(6, 5, 7, generator=draw), torch.randn(6, 5, 4, generator=draw)]
    leaves += [torch.randn(r, 7, generator=draw) for r in (2, 3)]
    leaves += [torch.randn(4, r, generator=draw) for r in (2, 3)]
    results = []
    for way in ("one_by_one", "grouped"):
        x, y, *factors = (leaf.double().requires_grad_() for leaf in leaves)
        A, B = factors[:2], factors[2:]
        # The second of three trainings has no adapter in this place.
        loras = [LoRA(A[0], B[0], 0.5, 0.0, 0), None, LoRA(A[1], B[1], -2.0, 0.0, 0)]
        routed = Routed(route, nn.Identity(), {}, "q_proj")
        if way == "grouped":
            found = routed.grouped(y, x, route.sizes(x, "q_proj"), loras)
        else:
            found = routed.one_by_one(y, x, loras)
        found.square().sum().backward()
        results.append([found, *(leaf.grad for leaf in (x, y, *factors))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(results[0][0][2].detach(), leaves[1][2].double())


def test_windows_of_rows_belong_to_the_adapters_of_the_rows():
    route = Route()
    route.set([(0, 1), (3, 2)])
    assert route.sizes(torch.zeros(12, 4), "qkv") == [4, 8]
    with pytest.raises(
        ContractError, match=r"qkv gets an input of shape \(4, 4\) for a batch of 3 rows"
    ):
        route.sizes(torch.zeros(4, 4), "qkv")
    route.set([(0, 4), (1, 8)])
    route.loosen()
    assert route.sizes(torch.zeros(3, 4), "qkv") == [1, 2]


def test_shorter_rows_are_padded_and_outputs_are_cut_again():
    calls = [
        ((), {"input_ids": torch.ones(n, length, dtype=torch.long), "flag": True})
        for n, length in ((2, 3), (1, 5))
    ]
    rows = [batch_rows(call, "Model") for call in calls]
    _, kwargs = stacked(calls, rows, "Model")
    assert kwargs["flag"] is True
    assert kwargs["input_ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    hidden = torch.arange(15.0).view(3, 5, 1)
    outputs = BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden, hidden + 1))
    first, second = divided(outputs, rows, [3, None], "Model")
    assert torch.equal(first.last_hidden_state, hidden[:2, :3])
    assert torch.equal(second.hidden_states[1], hidden[2:] + 1)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"mask": torch.zeros(1, 4)}, {"mask": torch.ones(1, 4)}, "cannot be divided among the adapters"),
        ({"mask": torch.zeros(2)}, {"mask": None}, "is a tensor for one adapter and none for another"),
        ({"mask": True}, {"mask": False}, "is a bool that differs between the adapters"),
        ({"mask": True}, {}, "is called with other arguments for one adapter"),
        ({"mask": torch.zeros(2, 3, 4)}, {"mask": torch.zeros(2, 3, 5)}, "more than the length differs"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_put_together_are_refused(first, second, message):
    ids = {"input_ids": torch.ones(2, 3)}
    with pytest.raises(ContractError, match=message):
        stacked([((), ids | first), ((), ids | second)], [2, 2], "Model")


@pytest.mark.parametrize("output", [torch.tensor(1.0), torch.zeros(3, 2), object()])
def test_outputs_without_the_rows_of_the_batch_are_refused(output):
    with pytest.raises(ContractError, match="cannot be divided among"):
        divided((output,), [2, 2], [None, None], "Model")


@pytest.mark.parametrize(
    ("device", "tokens", "expected"),
    [("cpu", 8, False), ("cuda", 1024, True), ("cuda", 1025, False), ("cuda", None, False)],
)
def test_joint_steps_are_for_few_tokens_on_a_gpu(device, tokens, expected):
    assert pays(device, tokens) == expected


def test_one_training_runs_at_a_time_and_equal_requests_are_answered_together():
    conductor = Conductor(lambda number: log.append(f"turn {number}"))
    log, groups = [], []

    def answer(given):
        groups.append(given)
        return [sum(given)] * len(given)

    def work(number):
        found = [conductor.ask(FORWARD, step, number, answer) for step in range(3 - number)]
        return conductor.meet(number, answer), found

    strands = conductor.run([lambda number=number: work(number) for number in range(3)])
    assert [strand.result[1] for strand in strands] == [[3, 1, 0], [3, 1], [3]]
    assert groups == [[0, 1, 2], [0, 1], [0], [0, 1, 2]]
    assert {strand.result[0] for strand in strands} == {3}


def test_a_training_that_waits_has_no_workers():
    def compute():
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        return psutil.Process().num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute()
        conductor = Conductor(lambda number: None)

        def work():
            first = compute()
            conductor.meet(None, lambda given: given)
            return first, compute()

        strands = conductor.run([work] * 3)
        counts = [strand.result for strand in strands]
        assert compute() <= counts[0][0]
    finally:
        torch.set_num_threads(before)
    # Of all that wait none has workers beside the one that computes.
    assert len({first for first, _ in counts}) == 1
    assert counts[-1][1] <= counts[0][0]


def test_a_fault_of_the_program_ends_all_trainings():
    conductor = Conductor(lambda number: None)
    conductor.strict = False
    ended = []

    def works():
        try:
            conductor.meet(None, lambda given: given)
        finally:
            ended.append("works")

    def fails():
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        conductor.run([works, fails])
    assert ended == ["works"]
