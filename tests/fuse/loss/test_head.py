"""Logits that are read after a change equal those of the forward, or an error says why they cannot be computed."""

import models
import pytest
import torch
from causal import pair

from peftkit.fuse.loss.head import Head, HeadOutput

ADAPTER = {"target_modules": ["q_proj", "lm_head"]}
TRAINED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
FROZEN = {"target_modules": ["q_proj"]}


def head_of(model):
    return model.get_base_model().lm_head


def trained_head(model):
    return head_of(model).modules_to_save["default"].weight


def step_by_data(model):
    """Like an optimizer that changes ``.data``, without a change of the version counters."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-1e-3)


def merge_and_unmerge(model):
    model.merge_adapter()
    model.unmerge_adapter()


def nudge(tensor):
    """Apply the smallest change to one element."""
    tensor.data.view(-1)[tensor.numel() // 3] *= 1 + 2 * torch.finfo(tensor.dtype).eps


CHANGES = {
    "merge": (ADAPTER, lambda model: model.merge_adapter()),
    "safe merge": (ADAPTER, lambda model: model.merge_adapter(safe_merge=True)),
    "merge and unload": (ADAPTER, lambda model: model.merge_and_unload()),
    "merge and unmerge": (ADAPTER, merge_and_unmerge),
    "step of the adapter": (ADAPTER, step_by_data),
    "A": (ADAPTER, lambda model: nudge(head_of(model).lora_A["default"].weight)),
    "B": (ADAPTER, lambda model: nudge(head_of(model).lora_B["default"].weight)),
    "step of a trained head": (TRAINED, step_by_data),
    "an element of a trained head": (TRAINED, lambda model: nudge(trained_head(model))),
    "a row of a frozen head": (FROZEN, lambda model: head_of(model).weight.data[5].mul_(2)),
    "a column of a frozen head": (FROZEN, lambda model: head_of(model).weight.data[:, 3].mul_(2)),
    "a factor on a frozen head": (FROZEN, lambda model: head_of(model).weight.data.mul_(2)),
    "signs of a frozen head": (FROZEN, lambda model: head_of(model).weight.data.neg_()),
    "new data of a frozen head": (
        FROZEN,
        lambda model: setattr(head_of(model).weight, "data", 2 * head_of(model).weight.data),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_logits_of_a_head_that_changed(change, dtype):
    config, act = CHANGES[change]
    _, ours = pair(dtype=dtype, **config)
    early, late = (ours(**models.batch("llama")) for _ in range(2))
    expected = early.logits.detach().clone()
    late.loss.backward()
    act(ours)
    with pytest.raises(RuntimeError, match=r"have changed since|merged into the output head"):
        late.logits.argmax(-1)
    assert torch.equal(early.logits.detach(), expected)


OTHER_STATES = {
    "eval": lambda model: model.eval(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": lambda model: head_of(model).scale_layer(3.0),
    "deleted": lambda model: model.delete_adapter("default"),
}


@pytest.mark.parametrize("change", OTHER_STATES)
def test_logits_after_a_change_that_keeps_the_weights(change):
    _, ours = pair(dtype=torch.float32, **ADAPTER)
    early, late = (ours(**models.batch("llama")) for _ in range(2))
    expected = early.logits.detach().clone()
    OTHER_STATES[change](ours)
    assert torch.equal(late.logits.detach(), expected)


def test_merging_is_detected_even_if_no_checked_weight_changes():
    layer = torch.nn.Module()
    layer.merged_adapters = []
    output = HeadOutput(torch.randn(2, 4), Head(torch.randn(5, 4), None, None, layer))
    layer.merged_adapters.append("default")
    with pytest.raises(RuntimeError, match="merged into the output head"):
        output.evaluate()


def test_logits_of_hidden_states_that_changed():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    for change in (lambda: hidden.data.view(-1)[7].mul_(1.5), lambda: hidden.mul_(1.0)):
        output = HeadOutput(hidden, Head(weight, None, None))
        change()
        with pytest.raises(RuntimeError, match="hidden states or the weights"):
            output.evaluate()


def test_logits_whose_weight_was_freed():
    """FSDP frees the memory of gathered weights after backward. The tensors remain without memory."""
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    output = HeadOutput(hidden, Head(weight, None, None))
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"FSDP .* logit_free=False"):
        output.evaluate()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset"])
def test_every_layout_is_checked(dtype, trained, layout):
    """So many elements of this head are read that changes of their exponents alone could sum to 0 in 64 bits."""
    V, D = 16640, 64
    assert V * D > 2**20
    assert V * D // (D + 1) % 4096 == 0
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "offset":
        weight = torch.randn(V * D + 1, dtype=dtype)[1:].view(V, D)
    weight.requires_grad_(trained)
    hidden = torch.randn(2, D, dtype=dtype)
    changes = [
        lambda w: w.mul_(2),
        lambda w: w.neg_(),
        lambda w: w[77].add_(1),
        lambda w: w[:, 5].add_(1),
    ]
    if trained:
        changes += [lambda w: w[9, 4:5].mul_(1.5)]
    for change in changes:
        output = HeadOutput(hidden, Head(weight, None, None))
        assert output.evaluate().shape == (2, V)
        change(weight.data)
        with pytest.raises(RuntimeError, match="have changed"):
            output.evaluate()
