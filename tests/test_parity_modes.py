"""Parity where training is run differently: dropout, checkpointing, compilation."""

import copy
import itertools

import models
import pairs
import pytest
import torch
from markers import slow_if
from torch import nn
from torch._dynamo.utils import counters

from peftkit.fuse import compute
from peftkit_kernels.core.dropout import dropout_mask, keep_scale

pytestmark = pytest.mark.usefixtures("one_thread")


class SeededDropout(nn.Module):
    """Dropout by the rule of the ops, in elementary torch ops, with the next seed of an iterator."""

    def __init__(self, p, seeds):
        super().__init__()
        self.p, self.seeds = p, seeds

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(*rows.shape, self.p, next(self.seeds))
        return (rows * mask * keep_scale(self.p)).reshape(x.shape)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "vit"])
def test_dropout_is_the_explicit_computation_with_the_same_seeds(name, monkeypatch):
    plain, fused = pairs.pair(name, torch.float64, logit_free=False, lora_dropout=0.3)
    drawn, explicit = itertools.count(2**60), itertools.count(2**60)
    monkeypatch.setattr(compute, "draw_seed", lambda: next(drawn))
    for module in list(plain.modules()):
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = SeededDropout(0.3, explicit)
    batch = pairs.inputs(name, torch.float64)
    loss_of = pairs.loss_from_logits if name in models.CAUSAL_NAMES else None
    with pairs.counted(monkeypatch) as calls:
        actual = pairs.step(fused, batch, loss_of)
    assert calls["peft"] == 0
    pairs.assert_close(actual, pairs.step(plain, batch, loss_of), 1e-10)
    adapted = sum(hasattr(module, "lora_dropout") for module in plain.modules())
    assert next(drawn) == next(explicit) == 2**60 + adapted


def test_dropout_follows_torchs_seed_and_evaluation_has_none():
    _, fused = pairs.pair("llama", lora_dropout=0.3)
    batch = pairs.inputs("llama")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(fused(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
    plain, fused = (model.eval() for model in pairs.pair("llama", lora_dropout=0.3))
    torch.testing.assert_close(fused(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "bert", "t5", "vit"])
def test_checkpointing_changes_no_bit(name, reentrant, lora_dropout, monkeypatch):
    _, fused = pairs.pair(name, lora_dropout=lora_dropout, model_dropout=0.1)
    fused.get_base_model().config.use_cache = False
    checkpointed = copy.deepcopy(fused)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and name != "vit":
        checkpointed.enable_input_require_grads()
    elif reentrant:
        checkpointed.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out.requires_grad_()
        )
    batch, results, counts = pairs.inputs(name), [], []
    for model in (fused, checkpointed):
        model(**batch)
        torch.manual_seed(3)
        with pairs.counted(monkeypatch) as calls:
            results.append(pairs.step(model, batch))
        counts.append(calls)
    if name == "t5":
        # the order in which the decoder's blocks add to the encoder's gradient changes
        pairs.assert_close(*results, 1e-5)
    else:
        pairs.assert_equal(*results)
    fused = [sum(calls.values()) - calls["peft"] for calls in counts]
    assert fused[1] > 1.5 * fused[0] > 0


@pytest.mark.parametrize("name", slow_if("llama".__ne__, ["llama", "bert", "vit"]))
def test_compiled_whole_like_stock(name):
    """No graph break is added: stock PEFT compiles into one graph, and so does the fused model."""
    plain, fused = pairs.pair(name)
    batch = pairs.inputs(name)
    expected = pairs.step(fused, batch)
    for model in (plain, fused):
        torch.compiler.reset()
        counters.clear()
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss = compiled(**batch).loss
        loss.backward()
        assert sum(counters["graph_break"].values()) == 0
        assert counters["stats"]["unique_graphs"] == 1
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        actual = {"loss": loss.detach()} | grads
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_compiled_with_dropout_and_without_gradients():
    _, fused = pairs.pair("llama", lora_dropout=0.3)
    batch = pairs.inputs("llama")
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    one, two = compiled(**batch).loss, compiled(**batch).loss
    assert one.isfinite()
    assert one != two
    with torch.no_grad():
        expected = fused.eval()(**batch).loss
        torch.testing.assert_close(compiled(**batch).loss, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "vit"])
def test_gradients_of_each_sample_by_torch_func(name):
    """What stock PEFT gives in ``vmap(grad(...))``, which has no rule for autograd functions, comes from plain operations."""
    pair = pairs.pair(name, torch.float64)
    # transformers looks into a padding mask, and torch has no such rule for its fused attention
    batch = pairs.inputs(name, torch.float64)
    batch.pop("attention_mask", None)

    def of_each_sample(model):
        model.set_attn_implementation("eager")
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(trained, sample):
            sample = {key: value[None] for key, value in sample.items()}
            return torch.func.functional_call(model, trained, kwargs=sample).loss

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, batch)

    plain, fused = map(of_each_sample, pair)
    pairs.assert_close(fused, plain, rtol=1e-10)
