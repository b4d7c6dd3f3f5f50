"""Quantised linears inside the ops of several linears: q, k and v together, and the gated MLP."""

from collections import Counter
from types import SimpleNamespace

import models
import pairs
import pytest
import torch
import transformers as hf
from integration.support import fused_calls
from peft import LoraConfig, get_peft_model

from peftkit import accelerate, explain
from peftkit.fuse import layer, quantized, storage
from peftkit_kernels.storage.int8 import Int8ComputeWeight

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


def _on_a_gpu(threshold):
    """A ``Linear8bitLt`` as far as the storage is read, on a device that is no CPU."""
    codes = torch.zeros(4, 8, dtype=torch.int8, device="meta")
    holder = {"CB": codes, "SCB": torch.zeros(4, device="meta")}
    state = SimpleNamespace(**holder, threshold=threshold, has_fp16_weights=False)
    weight = SimpleNamespace(device=torch.device("cuda"), **holder)
    return SimpleNamespace(state=state, weight=weight, training=False)


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, None), (6.0, 6.0)])
def test_on_a_gpu_8_bit_linears_are_multiplied_in_8_bits(threshold, expected):
    base = _on_a_gpu(threshold)
    assert storage.int8_obstacle(base) is None
    weight = storage.int8_weight(base)
    assert type(weight) is Int8ComputeWeight
    assert weight.threshold == expected
    base.weight.device = torch.device("xpu")
    assert "not tried on xpu" in storage.int8_obstacle(base)


@pytest.fixture
def in_8_bits(monkeypatch):
    """8-bit linears on the CPU are computed as on a GPU."""

    def weight(base):
        codes, absmax = storage._codes(base)
        return Int8ComputeWeight(codes, absmax, base.state.threshold or None)

    monkeypatch.setattr(quantized, "int8_obstacle", lambda base: None)
    monkeypatch.setattr(quantized, "int8_weight", weight)


def test_products_in_8_bits_are_those_of_bitsandbytes(saved, in_8_bits):
    """In evaluation bitsandbytes multiplies in 8 bits on the CPU too; in training it decodes the weights."""
    stock, fused = pair(saved, 8)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    # an outlier column: bitsandbytes lets its elements below the threshold count for the step of a row, peftkit does not
    x[:, 5] = 10 + x[:, 5].abs()
    x = (
        x.half().float()
    )  # bitsandbytes rounds x to float16 first, which would change some codes by one
    stocks, own = (m.base_model.model.model.layers[0].self_attn.q_proj for m in (stock, fused))
    with torch.no_grad():
        exact = stocks(x)
        for model in (stock, fused):
            model.eval()
        expected, found = stocks(x), own(x)
    rounding = (expected - exact).norm()
    assert rounding > 1e-4 * exact.norm()
    assert (found - expected).norm() <= 0.1 * rounding


def test_training_on_products_in_8_bits(saved, in_8_bits):
    stock, fused = pair(saved, 8)
    found, expected = step(fused), step(stock)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        cosine = torch.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.99, name


def test_dora_on_products_in_8_bits_runs_pefts_forward(saved, in_8_bits):
    _, fused = pair(saved, 8, use_dora=True)
    reasons = {row.reason for row in explain(fused).layers if row.is_adapter}
    assert reasons == {"DoRA on a base layer that multiplies in 8 bits runs PEFT's forward"}


def test_under_autocast_a_wider_input_of_products_in_8_bits_runs_pefts_forward(saved, in_8_bits):
    _, fused = pair(saved, 8)
    layer = fused.base_model.model.model.layers[0].mlp.down_proj
    with torch.autocast("cpu", torch.bfloat16):
        reason = layer.peftkit_plan(torch.zeros(2, 128))
        assert "under autocast its input is torch.float32" in reason
        assert not isinstance(layer.peftkit_plan(torch.zeros(2, 128).bfloat16()), str)
