"""Installing and removing the logit-free loss, and all it leaves alone."""

import models
import pytest
import torch
from causal import base_model, pair, peft_model

from peftkit.fuse.loss import install_logit_free, logit_free_status, remove_logit_free


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_other_models_are_left_alone(name):
    model = models.tiny(name)
    before = models_state(model)
    reason = install_logit_free(model)
    assert type(model).__name__ in reason
    assert logit_free_status(model) == (False, reason)
    remove_logit_free(model)
    assert models_state(model) == before


def models_state(model):
    """Every attribute of every module, by identity; hooks and children by their keys and values."""
    return {
        name: {
            key: list(map(id, (*value.keys(), *value.values())))
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_removing_restores_the_model_exactly(family):
    """GPT-2 carries a loss function of its own instance, set by its user."""
    model = peft_model(family)
    if family == "gpt2":
        model.get_base_model().loss_function = model.get_base_model().loss_function
    before = models_state(model)
    batch = models.batch("llama")
    expected = model(**batch)
    assert install_logit_free(model) is None
    assert install_logit_free(model) is None
    model(**batch).loss.backward()
    model.zero_grad()
    remove_logit_free(model)
    assert models_state(model) == before
    output = model(**batch)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    remove_logit_free(model)
    assert models_state(model) == before


def test_outside_a_forward_with_labels_nothing_differs():
    stock, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    installed = models_state(ours)
    ours(**batch)
    assert models_state(ours) == installed
    labels = batch.pop("labels")
    assert labels is not None
    assert type(ours(**batch).logits) is torch.Tensor
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)
    stock.eval()
    ours.eval()
    generated = ours.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, stock.generate(**batch, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_cut_off(error):
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    installed = models_state(ours)

    def fail(*args):
        raise error("cut off")

    # After the head, before the loss: labels that cannot be read.
    norm = ours.get_base_model().model.norm
    handle = norm.register_forward_hook(fail)
    with pytest.raises(error, match="cut off"):
        ours(**batch)
    handle.remove()
    del batch["labels"]
    assert type(ours(**batch).logits) is torch.Tensor
    assert models_state(ours) == installed


def test_a_loss_function_of_ones_own_gets_ordinary_logits():
    _, ours = pair(dtype=torch.float32)
    seen = []

    def own_loss(logits, labels, vocab_size, **kwargs):
        seen.append(type(logits))
        return logits.logsumexp(-1).mean()

    ours.get_base_model().loss_function = own_loss
    assert ours(**models.batch("llama")).loss.requires_grad
    assert seen == [torch.Tensor]
    assert "own_loss" in logit_free_status(ours)[1]
    assert ours.get_base_model().loss_function is own_loss


def test_hooks_on_the_head_are_called():
    stock, ours = pair(dtype=torch.float32)
    for model in (stock, ours):
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: 2 * out)
    assert "hooks" in logit_free_status(ours)[1]
    batch = models.batch("llama")
    assert torch.equal(ours(**batch).loss, stock(**batch).loss)


def test_status_of_a_model_where_it_is_not_installed():
    assert logit_free_status(base_model())[0] is False
    _, ours = pair()
    assert logit_free_status(ours)[0] is True
