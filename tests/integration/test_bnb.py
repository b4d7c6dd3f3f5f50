"""A 4-bit bitsandbytes base under ``wrap``: its linears are fused on the weights as they are stored."""

from collections import Counter

import models
import peft
import pytest
import torch
import transformers as hf
from integration.support import (
    LOSS_TOLERANCE,
    adapter_config,
    adapter_tensors,
    fused_calls,
    largest_difference,
    times,
    tiny_peft,
    trainer,
)

import peftkit

FORWARD = Counter(
    lora_qkv=2, nf4_linear=2, lora_swiglu_mlp=2, frozen_rms_norm=5, linear_cross_entropy=1
)
"""Calls in one forward of two layers."""


@pytest.fixture
def quantized(tmp_path):
    """Load a small Llama with NF4 linears, ready for training."""
    # rows are whole blocks of 64: bitsandbytes decodes others wrongly on the CPU
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    settings = models.tiny("llama").config.to_dict() | sizes | {"head_dim": 16}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).save_pretrained(tmp_path / "base")

    def load():
        settings = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        )
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    return load


def test_losses_equal_those_of_stock_peft(quantized, tmp_path):
    stock = trainer(tiny_peft(fused=False, base=quantized()), tmp_path, max_steps=10)
    stock.train()
    torch.manual_seed(1)
    model = peftkit.wrap(quantized(), adapter_config(), strict=True)
    start = adapter_tensors(model)
    fused = trainer(model, tmp_path, max_steps=10)
    with fused_calls() as calls:
        fused.train()

    assert calls == times(FORWARD, 10)
    assert fused.losses == pytest.approx(stock.losses, rel=0, abs=LOSS_TOLERANCE)
    assert largest_difference(adapter_tensors(model), start) > 5e-3


def test_default_config_adapts_every_4_bit_linear_and_explains_it(quantized):
    model = peftkit.wrap(quantized())
    layers = {layer.name: layer for layer in peftkit.explain(model).layers}
    adapted = [layer for layer in layers.values() if layer.is_adapter]
    assert len(adapted) == 14
    joined = [layer for name, layer in layers.items() if name.endswith(("v_proj", ".mlp"))]
    assert {layer.path for layer in joined} == {"fused:torch"}
    assert Counter(layer.method for layer in joined)["shared input"] == 2
    assert {(layer.path, layer.reason) for layer in adapted} == {("fused:torch", "")}
    norms = [layer for name, layer in layers.items() if name.endswith("norm")]
    assert len(norms) == 5
    assert {layer.path for layer in norms} == {"fused:torch"}
    assert not any("lm_head" in name for name in layers)
