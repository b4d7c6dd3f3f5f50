"""Installing and removing the logit-free loss, and everything that it must not change."""

import copy
import pickle
import sys
import threading

import models
import pytest
import torch
from causal import LORA, base_model, pair, peft_model
from peft import LoraConfig

from peftkit.fuse.loss import (
    LazyLogits,
    install_logit_free,
    logit_free_status,
    remove_logit_free,
)


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_other_models_are_not_changed(name):
    model = models.tiny(name)
    before = models_state(model)
    reason = install_logit_free(model)
    assert type(model).__name__ in reason
    assert logit_free_status(model) == (False, reason)
    remove_logit_free(model)
    assert models_state(model) == before


def models_state(model):
    """Class and every attribute of every module, by identity; hooks and children by their keys and values."""
    return {
        (name, type(module)): {
            key: list(map(id, (*value.keys(), *value.values())))
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {}),
    ],
    ids=["frozen", "adapter", "trained", "gpt2"],
)
def test_removing_restores_the_model_exactly(family, head):
    """The user has set a loss function on this GPT-2 instance."""
    model = peft_model(family, **head)
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
def test_an_interrupted_forward(error):
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    installed = models_state(ours)

    def fail(*args):
        raise error("cut off")

    # Labels that raise an error after the head and before the loss.
    norm = ours.get_base_model().model.norm
    handle = norm.register_forward_hook(fail)
    with pytest.raises(error, match="cut off"):
        ours(**batch)
    handle.remove()
    del batch["labels"]
    assert type(ours(**batch).logits) is torch.Tensor
    assert models_state(ours) == installed


def test_a_custom_loss_function_gets_ordinary_logits():
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


def test_threads_can_share_a_model(monkeypatch):
    _, ours = pair(dtype=torch.float32, target_modules=["q_proj", "lm_head"])
    before = models_state(ours)
    ours.eval()
    batches = [models.batch("llama", seed=seed) for seed in range(2)]
    expected = [ours(**batch).loss.item() for batch in batches]
    losses, errors = [[], []], []
    barrier = threading.Barrier(2, timeout=60)

    def work(index):
        try:
            barrier.wait()
            for _ in range(150):
                with torch.no_grad():
                    output = ours(**batches[index])
                assert type(output.logits) is LazyLogits
                losses[index].append(output.loss.item())
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert losses == [[loss] * 150 for loss in expected]
    assert logit_free_status(ours)[0]
    ours.train()
    assert models_state(ours) == before
    remove_logit_free(ours)
    assert type(ours(**batches[0]).logits) is torch.Tensor


def test_one_thread_computes_a_loss_while_another_generates():
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    expected = ours(**batch).loss.item()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    started, stop, found = threading.Event(), threading.Event(), []

    def generate():
        while not stop.is_set():
            found.append(type(ours(**prompt).logits))
            started.set()

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        assert started.wait(60)
        losses = [ours(**batch).loss.item() for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert losses == [expected] * 20
    assert set(found) == {torch.Tensor}


@pytest.mark.parametrize("inner", ["without labels", "with labels", "generate"])
def test_a_forward_within_a_forward(inner):
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, found = ours(**batch).loss.item(), []

    def run(*args):
        handle.remove()
        if inner == "generate":
            found.append(ours.generate(**prompt, max_new_tokens=2).shape[1] - 12)
        else:
            found.append(type(ours(**(batch if inner == "with labels" else prompt)).logits))

    handle = ours.get_base_model().model.norm.register_forward_hook(run)
    output = ours(**batch)
    wanted = {"generate": 2, "with labels": LazyLogits, "without labels": torch.Tensor}
    assert found == [wanted[inner]]
    assert type(output.logits) is LazyLogits
    assert output.loss.item() == expected


def test_the_head_alone_after_an_interrupted_forward():
    """Ctrl-C skips the hook that runs after the forward."""
    _, ours = pair(dtype=torch.float32)
    base, batch = ours.get_base_model(), models.batch("llama")

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = base.model.norm.register_forward_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            ours(**batch)
    handle.remove()
    assert type(ours(**batch).logits) is LazyLogits
    hidden = base.model(batch["input_ids"]).last_hidden_state
    assert type(base.lm_head(hidden)) is torch.Tensor


def test_a_copy_and_a_pickle_compute_the_loss_too():
    _, ours = pair(dtype=torch.float32, target_modules=["q_proj", "lm_head"])
    batch = models.batch("llama")
    expected = ours(**batch).loss
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        output = twin(**batch)
        assert type(output.logits) is LazyLogits
        assert torch.equal(output.loss, expected)
        remove_logit_free(twin)
        assert type(twin(**batch).logits) is torch.Tensor


def test_a_replica_of_data_parallel_uses_its_own_tensors():
    """``nn.parallel.replicate`` makes such copies and sets their tensors to those of another device."""
    _, ours = pair(dtype=torch.float32)
    base, batch = ours.get_base_model(), models.batch("llama")
    replica, head = base._replicate_for_data_parallel(), base.lm_head._replicate_for_data_parallel()
    head.weight, head._parameters["bias"] = 2 * base.lm_head.weight.detach(), None
    replica._modules["lm_head"] = head
    assert replica.lm_head is not base.lm_head
    output = replica(**batch)
    assert type(output.logits) is LazyLogits
    assert output.logits.detach().allclose(2 * base(**batch).logits.detach())


def test_functional_call():
    stock, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    weights = {name: 2 * tensor.detach() for name, tensor in stock.named_parameters()}
    expected = torch.func.functional_call(stock, weights, (), batch)
    output = torch.func.functional_call(ours, weights, (), batch)
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss, expected.loss)


def test_func_grad_gets_ordinary_logits():
    results = []
    for model in pair(dtype=torch.float32):
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(tensors, model=model):
            return torch.func.functional_call(model, tensors, (), models.batch("llama")).loss

        results.append(torch.func.grad(loss)(trained))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


def test_a_new_head_keeps_the_loss_and_the_former_one_is_restored():
    """PEFT wraps the head in a LoRA layer. The former head is then the base layer of the LoRA layer."""
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    ours(**batch)
    ours.add_adapter("second", LoraConfig(**{**LORA, "target_modules": ["lm_head"]}))
    ours.base_model.set_adapter(["default", "second"])
    assert type(ours(**batch).logits) is LazyLogits
    remove_logit_free(ours)
    assert type(ours.get_base_model().lm_head.base_layer) is torch.nn.Linear
    assert not any("peftkit" in key for module in ours.modules() for key in vars(module))
