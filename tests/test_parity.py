"""Fused models give the numbers of stock PEFT: logits, loss, every gradient, and the losses of a short training."""

import copy

import models
import pairs
import pytest
import torch
import transformers as hf

from peftkit_kernels import native
from peftkit_kernels.ops.attention.torch_impl import Attention

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS = {
    "llama": {"lora_qkv": 2, "lora_linear": 2, "lora_swiglu_mlp": 2, "frozen_rms_norm": 5},
    "qwen3": {"lora_qkv": 2, "lora_linear": 2, "lora_swiglu_mlp": 2, "frozen_rms_norm": 9},
    "gemma3": {"lora_qkv": 2, "lora_linear": 2, "lora_swiglu_mlp": 2, "frozen_rms_norm": 13},
    "mistral": {"lora_qkv": 2, "lora_linear": 2, "lora_swiglu_mlp": 2, "frozen_rms_norm": 5},
    "gpt2": {"lora_linear": 8, "frozen_layer_norm": 5},
    "opt": {"lora_qkv": 2, "lora_linear": 6, "frozen_layer_norm": 5},
    "phi3": {"lora_linear": 4, "lora_swiglu_mlp": 2, "frozen_rms_norm": 5},
    "bert": {"lora_qkv": 2, "lora_linear": 7, "frozen_layer_norm": 5},
    "t5": {"lora_qkv": 6, "lora_linear": 20, "frozen_rms_norm": 12},
    "vit": {"lora_qkv": 2, "lora_linear": 6, "frozen_layer_norm": 5},
}
"""Calls of each op in one forward: none of these models may run PEFT's own forward anywhere."""

every_model = pytest.mark.parametrize("name", models.NAMES)


@every_model
def test_every_layer_runs_fused(name, monkeypatch):
    plain, fused = pairs.pair(name)
    batch = pairs.inputs(name)
    with pairs.counted(monkeypatch) as calls:
        pairs.step(plain, batch)
    assert set(calls) == {"peft"}
    fused(**batch)  # cross-attention finds out in its first forward that its inputs differ
    with pairs.counted(monkeypatch) as calls:
        pairs.step(fused, batch)
    assert dict(calls) == CALLS[name]


@every_model
def test_float64(name):
    """With the loss from float64 logits in both; transformers' own loss would round them to float32."""
    plain, fused = pairs.pair(name, torch.float64, logit_free=False)
    batch = pairs.inputs(name, torch.float64)
    loss_of = pairs.loss_from_logits if name in models.CAUSAL_NAMES else None
    expected = pairs.step(plain, batch, loss_of)
    pairs.assert_close(pairs.step(fused, batch, loss_of), expected, 1e-10)
    with torch.no_grad():
        logits = {"logits": fused(**batch).logits}
        pairs.assert_close(logits, {"logits": plain(**batch).logits}, 1e-10)


@pytest.mark.parametrize("name", models.CAUSAL_NAMES)
def test_float64_without_logits(name):
    """Transformers' own loss rounds the logits to float32 in both: a few dozen roundings of that size remain."""
    plain, fused = pairs.pair(name, torch.float64)
    batch = pairs.inputs(name, torch.float64)
    expected = pairs.step(plain, batch)
    actual = pairs.step(fused, batch)
    assert actual["loss"].dtype is expected["loss"].dtype
    pairs.assert_close(actual, expected, 64 * torch.finfo(torch.float32).eps)


@every_model
def test_float32_is_as_near_to_float64_as_stock(name):
    pairs.assert_as_good(*pairs.pair(name), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "t5", "vit"])
def test_float32_adapters_on_a_16_bit_base(name, dtype):
    plain, fused = pairs.pair(name, dtype)
    assert {p.dtype for p in fused.parameters()} == {dtype, torch.float32}
    pairs.assert_as_good(plain, fused, name, dtype)


@every_model
def test_autocast_is_as_near_to_float64_as_stock(name):
    pairs.assert_as_good(*pairs.pair(name), name, torch.bfloat16)


@every_model
def test_twenty_optimiser_steps_give_the_same_losses(name):
    losses = []
    for model in pairs.pair(name):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for i in range(20):
            loss = model(**pairs.inputs(name, seed=i % 4)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    fused, plain = torch.tensor(losses)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0.0)
    assert plain[16:].mean() < 0.98 * plain[:4].mean(), "nothing has been learnt"


@pytest.fixture
def large_heads(monkeypatch):
    """A stock and a fused Llama that the native attention takes, and the list of its calls."""
    config = copy.deepcopy(models.tiny("llama").config)
    config.update({"head_dim": 32, "hidden_size": 64})
    plain = pairs.adapted(hf.LlamaForCausalLM(config))
    monkeypatch.setattr(models, "SEQUENCE_LENGTH", 24)
    fused = pairs.accelerate(copy.deepcopy(plain))
    calls, forward = [], Attention.forward
    monkeypatch.setattr(
        Attention, "forward", staticmethod(lambda *args: calls.append(1) or forward(*args))
    )
    return plain, fused, calls


def test_head_size_and_length_of_the_native_attention(large_heads):
    """The tiny models are too small for it; this one is not."""
    plain, fused, calls = large_heads
    pairs.assert_as_good(plain, fused, "llama")
    assert len(calls) == (0 if native.obstacle() else 8)


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (2, 1, 24, 24), (2, 4, 24, 24)], ids=str)
def test_masks_of_ones_own(large_heads, shape):
    """Four-dimensional masks reach the attention as they are, also those that are broadcast."""
    plain, fused, _ = large_heads
    batch = pairs.inputs("llama")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    batch["attention_mask"] = mask | torch.eye(24, dtype=torch.bool)
    truth = pairs.step(pairs.in_float64(plain), batch, pairs.loss_from_logits)
    pairs.assert_near_enough([(pairs.step(fused, batch), pairs.step(plain, batch), truth)])
