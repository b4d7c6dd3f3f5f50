"""The gradient of the logits: right for a loss of the logits, and an error for the loss that was computed without them."""

import functools

import models
import pytest
import torch
from causal import pair

WATCHERS = {
    "retain_grad": lambda output: output.logits.retain_grad(),
    "register_hook": lambda output: output.logits.register_hook(lambda grad: None),
}


@pytest.mark.parametrize("watch", WATCHERS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_of_the_models_loss_for_its_logits_is_refused(family, watch):
    """Gemma 2 applies further steps to the output of its head."""
    _, ours = pair(family, dtype=torch.float32)
    output = ours(**models.batch("llama"))
    handle = WATCHERS[watch](output)
    with pytest.raises(RuntimeError, match="logit_free=False"):
        output.loss.backward(retain_graph=True)
    if handle is not None:
        handle.remove()
        output.loss.backward()


def test_hooks_that_fsdp_registers_are_no_reason_to_refuse():
    """FSDP registers a hook on every output of a model, logits and loss, to run code when backward begins."""
    _, ours = pair(dtype=torch.float32)
    output = ours(**models.batch("llama"))

    def begin(grad):
        return grad

    begin.__module__ = "torch.distributed.fsdp._runtime_utils"
    output.logits.register_hook(functools.partial(begin))
    output.loss.backward(retain_graph=True)
    output.logits.register_hook(lambda grad: None)
    with pytest.raises(RuntimeError, match="logit_free=False"):
        output.loss.backward()


DERIVATIVES = {
    "grad": lambda loss, z: torch.autograd.grad(loss, z),
    "grad of several": lambda loss, z: torch.autograd.grad([loss], [z], allow_unused=True),
    "backward with inputs": lambda loss, z: loss.backward(inputs=[z]),
    "autograd.backward": lambda loss, z: torch.autograd.backward([loss], inputs=[z]),
}


@pytest.mark.parametrize("derive", DERIVATIVES)
def test_derivatives_of_the_models_loss_for_its_logits_are_refused(derive):
    _, ours = pair("gemma2", dtype=torch.float32)
    output = ours(**models.batch("llama"))
    with pytest.raises(RuntimeError, match="logit_free=False"):
        DERIVATIVES[derive](output.loss, output.logits)
    with pytest.raises(RuntimeError, match="logit_free=False"):
        DERIVATIVES[derive](output.loss + output.logits.sum(), output.logits)


@pytest.mark.parametrize("derive", DERIVATIVES)
def test_derivatives_of_a_custom_loss_for_the_logits(derive):
    grads = []
    for model in pair("gemma2", dtype=torch.float32):
        logits = model(**models.batch("llama")).logits
        result = DERIVATIVES[derive](logits.square().sum(), logits)
        grads.append(logits.grad if result is None else result[0])
    assert grads[0].any()
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_step_after_a_hook_calls_it():
    """A cast of the logits is recorded. The gradient of later steps still passes through the logits."""
    seen = []
    for model in pair(dtype=torch.bfloat16):
        logits = model(**models.batch("llama")).logits
        wide = logits.float() * 3
        logits.register_hook(seen.append)
        torch.tanh(wide).view(-1).square().sum().backward()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].any()
    assert torch.equal(*seen)
