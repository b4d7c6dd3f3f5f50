"""Quantised linears inside the ops of several linears: q, k and v together, and the gated MLP."""

from collections import Counter

import models
import pairs
import pytest
import torch
import transformers as hf
from integration.support import fused_calls
from peft import LoraConfig, get_peft_model

from peftkit import accelerate, explain
from peftkit.fuse import layer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Llama whose rows are whole blocks of 64: bitsandbytes decodes others wrongly on the CPU."""
    settings = models.tiny("llama").config.to_dict()
    settings |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).save_pretrained(path)
    return path


def loaded(path, bits, compute=torch.float32):
    options = {"load_in_8bit": True}
    if bits == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_use_double_quant": True,
        }
    return hf.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=hf.BitsAndBytesConfig(**options), dtype=torch.float32
    )


def pair(path, bits, targets=TARGETS, compute=torch.float32, **config):
    """The same model under PEFT and fused, in training."""
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **config)
    stock, fused = (get_peft_model(loaded(path, bits, compute), settings) for _ in range(2))
    for model in (stock, fused):
        pairs.fill_factors(model)
        model.train()
    return stock, accelerate(fused)


def step(model):
    ids = torch.arange(24).view(2, 12) % 60
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | grads


JOINED = Counter(lora_qkv=2, lora_swiglu_mlp=2)


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj", "down_proj"]], ids=len)
# PEFT's DoRA on an 8-bit layer fails on the CPU, so there is nothing to compare with
@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])
def test_a_step_is_fused_across_linears_and_equals_pefts(saved, bits, targets, dora):
    stock, fused = pair(saved, bits, targets, use_dora=dora)
    with fused_calls() as calls:
        found = step(fused)
    if not dora:
        assert calls & JOINED == JOINED
    pairs.assert_close(found, step(stock), 1e-4)
    assert {row.path for row in explain(fused).layers if row.is_adapter} == {"fused:torch"}


def test_two_dropout_masks_of_two_steps_differ(saved):
    _, fused = pair(saved, 4, lora_dropout=0.5)
    assert step(fused)["loss"] != step(fused)["loss"]


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_activations_are_multiplied_in_the_compute_dtype(saved, autocast):
    """As after ``prepare_model_for_kbit_training``."""
    stock, fused = pair(saved, 4, compute=torch.bfloat16)
    exact, _ = pair(saved, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with fused_calls() as calls:
            found = step(fused)
        expected = step(stock)
    if autocast:
        assert calls & JOINED == JOINED
    else:  # adapters get the input unrounded, as in PEFT
        assert calls["nf4_linear"] == 14
        assert not calls & JOINED
    assert {value.dtype for value in found.values()} == {torch.float32}
    truth = step(exact)
    for name, value in truth.items():
        ours, theirs = ((grads[name] - value).norm() / value.norm() for grads in (found, expected))
        assert ours <= (1.5 * theirs + 1e-3 if autocast else 1.05 * theirs + 1e-4), name


def test_linears_that_compute_in_different_dtypes_run_alone(saved):
    _, fused = pair(saved, 4, compute=torch.bfloat16)
    inner = fused.base_model.model.model.layers[0]
    inner.mlp.down_proj.base_layer.compute_dtype = torch.float32
    inner.self_attn.k_proj.base_layer.compute_dtype = torch.float32
    with fused_calls() as calls, torch.autocast("cpu", torch.bfloat16):
        step(fused)
    assert calls["lora_swiglu_mlp"] == calls["lora_qkv"] == 1
    assert calls["nf4_linear"] == 2 + 3 + 3


def test_in_bfloat16_all_linears_are_joined(saved):
    stock, fused = pair(saved, 4, compute=torch.bfloat16)
    for model in (stock, fused):
        model.to(torch.bfloat16)
    with fused_calls() as calls:
        found = step(fused)
    assert calls & JOINED == JOINED
    assert abs(found["loss"] - step(stock)["loss"]) < 0.02


def test_8_bit_linears_in_evaluation_run_their_own_forward(saved):
    stock, fused = pair(saved, 8)
    for model in (stock, fused):
        model.eval()
    with torch.no_grad(), fused_calls() as calls:
        ids = torch.arange(24).view(2, 12)
        torch.testing.assert_close(fused(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert not calls & JOINED
    reasons = {row.reason for row in explain(fused).layers if row.method == "gated MLP"}
    assert all("quantises the activations in evaluation" in reason for reason in reasons)


def test_the_joined_mlp_keeps_less_for_the_backward(saved):
    kept = []
    for model in pair(saved, 4):
        total = 0

        def pack(t):
            nonlocal total
            total += t.nbytes if t.is_floating_point() else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ids = torch.arange(256).view(1, 256) % 60
            model(input_ids=ids, labels=ids).loss.backward()
        kept.append(total)
    stock, fused = kept
    assert fused < 0.6 * stock


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_layers_of_quantised_linears_are_fused_as_on_a_gpu(saved, monkeypatch, bits, targets):
    monkeypatch.setattr(layer, "is_counting", lambda: True)
    monkeypatch.setattr(layer, "obstacle", lambda *_: None)
    calls = []
    original = layer.lora_decoder_layer

    def counted(*args, **options):
        calls.append(args[0].shape)
        return original(*args, **options)

    monkeypatch.setattr(layer, "lora_decoder_layer", counted)
    stock, fused = pair(saved, bits, targets)
    found = step(fused)
    assert len(calls) == 2
    pairs.assert_close(found, step(stock), 1e-4)
