"""Attention of whole models by the native passes: parity with sdpa, and every case that must run sdpa."""

import copy
import pickle

import pytest
import torch
from markers import needs_native
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from peftkit import accelerate, explain, restore, wrap
from peftkit.fuse.attention import FusedAttention
from peftkit_kernels.ops.attention.torch_impl import Attention

pytestmark = needs_native


def llama(**changes) -> LlamaForCausalLM:
    """A tiny Llama with a head size that the native passes support."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the native passes computed."""
    seen: list[tuple[int, ...]] = []
    original = Attention.forward

    def record(ctx, q, *rest):
        seen.append(tuple(q.shape))
        return original(ctx, q, *rest)

    monkeypatch.setattr(Attention, "forward", record)
    return seen


def loss_and_grads(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_loss_and_gradients_equal_those_of_sdpa(calls, padding):
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    if padding:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, slice(0, 9) if padding == "left" else slice(-9, None)] = 0
    model = wrap(llama())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    ours = loss_and_grads(model, batch)
    assert len(calls) == 2
    theirs = loss_and_grads(restore(model), batch)
    assert len(calls) == 2
    exact = loss_and_grads(model.double(), batch)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        rounding = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (a - truth).abs().max() <= 4 * (b - truth).abs().max() + 16 * rounding


def test_the_config_stays_sdpa_and_a_change_takes_effect():
    model = wrap(llama())
    attention = model.get_base_model().model.layers[0].self_attn
    assert isinstance(attention, FusedAttention)
    assert type(attention).__name__ == "LlamaAttention"
    assert model.config._attn_implementation == "sdpa"
    assert attention.config._attn_implementation == "peftkit_sdpa"
    assert attention.config.hidden_size == 128
    model.get_base_model().set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    (row,) = [r for r in explain(model).layers if r.name.endswith("layers.0.self_attn")]
    assert (row.path, row.reason) == ("peft", "the model's attention is eager")


def test_decoding_dropout_and_other_dtypes_run_sdpa(calls):
    model = wrap(llama(attention_dropout=0.1))
    ids = torch.randint(64, (1, 40))
    model.train()(input_ids=ids)
    assert calls == []
    generated = model.eval().generate(
        input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert calls == [(1, 4, 40, 32)] * 2  # only the prompt has enough queries
    assert torch.equal(
        generated,
        restore(model).generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )
    wrap(llama()).bfloat16()(input_ids=ids)
    assert len(calls) == 2


def test_bidirectional_attention(calls):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    ids = torch.randint(64, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    actual = accelerate(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert len(calls) == 1
    assert torch.allclose(actual[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_unsupported_head_sizes_are_not_fused():
    model = wrap(llama(num_attention_heads=8))  # 16 features per head
    assert not any(isinstance(module, FusedAttention) for module in model.modules())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_fused_and_independent(calls, copier):
    model = wrap(llama())
    twin = copier(model)
    ids = torch.randint(64, (1, 40))
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(calls) == 4
    restore(model)
    assert isinstance(twin.get_base_model().model.layers[0].self_attn, FusedAttention)
