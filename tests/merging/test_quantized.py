"""Bases in NF4 and int8: merged into decoded weights, back into their storage, and into the original."""

import copy
import json

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model

from peftkit import ContractError, merge

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY = "model.layers.0.self_attn.q_proj"
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "bf16 storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose rows are whole blocks of 64."""
    config = models.tiny("llama").config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    model = hf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def quantized(folder, kind, dtype=torch.float32):
    config = hf.BitsAndBytesConfig(**SETTINGS[kind])
    return hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(folder, kind, size=0.1, **changes):
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4} | changes
    model = get_peft_model(quantized(folder, kind), LoraConfig(**settings))
    return cases.trained(model, size)


def decoded(linear):
    """The weight by bitsandbytes' own functions."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    codes = linear.state.CB if linear.state.CB is not None else weight.CB
    scale = linear.state.SCB if linear.state.SCB is not None else weight.SCB
    return bnb.int8_vectorwise_dequant(codes, scale)


def linears(model):
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        and "lora" not in type(module).__module__
    }


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_into_the_decoded_weights(kind, dora, folder, tmp_path):
    model = adapted(folder, kind, use_dora=dora)
    before = {name: decoded(linear) for name, linear in linears(model).items()}
    found = merge(model, tmp_path / "merged", "fp32")
    files = cases.tensors(tmp_path / "merged")
    assert found.recovery > 1 - 1e-8
    assert found.outputs.effect > 0.01
    assert "the decoded quantised weights" in found.facts["merged_into"]
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert len(before) == 14
    # PEFT's layers on the decoded weights
    plain = hf.LlamaForCausalLM.from_pretrained(folder)
    for name, weight in before.items():
        plain.get_submodule(name).weight.data = weight.clone()
    model.save_pretrained(tmp_path / "adapter")
    reference = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(files[name], tensor), name


@pytest.mark.parametrize("rounding", ["outputs", "nearest"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_back_into_the_storage_of_the_base(kind, rounding, folder, tmp_path):
    model = adapted(folder, kind, size=0.02)
    stored = copy.deepcopy(model.get_base_model().state_dict())
    batch = cases.inputs(rows=8)
    found = merge(
        model, tmp_path / "merged", "base", rounding=rounding, probe=batch, min_recovery=None
    )
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours = linears(loaded)
    assert ours.keys() == linears(model).keys()
    changed = 0
    for name, linear in linears(model).items():
        # as bytes, because a bfloat16 storage has NaNs
        same = torch.equal(*(m.weight.data.view(torch.uint8) for m in (ours[name], linear)))
        adapter = name.endswith(("q_proj", "v_proj", "down_proj"))
        assert same or adapter, name
        changed += not same
        if adapter and rounding == "outputs":
            # the scales stay, so the result differs from the base in its levels only
            scales = [
                t for k, t in stored.items() if k.endswith(f"{name}.base_layer.weight.absmax")
            ]
            for scale in scales:
                assert torch.equal(ours[name].weight.quant_state.absmax, scale)
    assert changed == 6
    assert {layer.stored for layer in found.layers} == {"int8" if kind == "int8" else "nf4"}
    assert found.recovery > (0.8 if kind == "int8" else -0.5)
    assert all(torch.isfinite(cases.logits(loaded, batch)).flatten())


def test_nearest_is_what_bitsandbytes_stores(folder, tmp_path):
    for kind in ("nested", "int8"):
        model = adapted(folder, kind)
        merge(model, tmp_path / kind, "base", rounding="nearest", min_recovery=None)
        merge(model, tmp_path / f"{kind}-dense", "fp32", certificate=False)
        dense = cases.tensors(tmp_path / f"{kind}-dense")[f"{QUERY}.weight"]
        files = cases.tensors(tmp_path / kind)
        if kind == "int8":
            codes, scale, _ = bnb.int8_vectorwise_quant(dense.half())
            assert torch.equal(files[f"{QUERY}.weight"], codes)
            assert torch.equal(files[f"{QUERY}.SCB"], scale)
        else:
            packed, state = bnb.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
            assert torch.equal(files[f"{QUERY}.weight"], packed)
            for key, value in state.as_dict(packed=True).items():
                assert torch.equal(files[f"{QUERY}.weight.{key}"], value), key


def test_an_unadapted_quantised_model_part_is_copied_byte_for_byte(folder, tmp_path):
    model = adapted(folder, "nested")
    base = quantized(folder, "nested")
    base.save_pretrained(tmp_path / "base")
    merge(model, tmp_path / "merged", "base", min_recovery=None)
    ours, theirs = cases.tensors(tmp_path / "merged"), cases.tensors(tmp_path / "base")
    assert ours.keys() == theirs.keys()
    kept = [name for name in theirs if ".k_proj." in name or "norm" in name or "lm_head" in name]
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(ours[name], theirs[name]), name


def test_merged_into_the_original_weights(folder, tmp_path):
    model = adapted(folder, "nested")
    found = merge(model, tmp_path / "merged", "fp32", base_weights=folder, min_recovery=None)
    assert "trained on the quantised ones (nf4)" in found.facts["merged_into"]
    files, original = cases.tensors(tmp_path / "merged"), cases.tensors(folder)
    key = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(files[key], original[key])
    layer = model.get_base_model().get_submodule(QUERY)
    expected = original[f"{QUERY}.weight"] + layer.get_delta_weight("default")
    torch.testing.assert_close(files[f"{QUERY}.weight"], expected, rtol=0, atol=1e-6)
    # the effect is not the same on other weights, but similar
    assert 0.5 < found.recovery < 1 - 1e-6


def test_base_weights_that_do_not_fit(folder, tmp_path):
    model = adapted(folder, "nested")
    with pytest.raises(ValueError, match="dtype='base' keeps the quantised weights"):
        merge(model, tmp_path / "merged", "base", base_weights=folder)
    with pytest.raises(ValueError, match="the base model is not quantised"):
        merge(cases.adapted("LoRA"), tmp_path / "merged", base_weights=folder)
    with pytest.raises(ContractError, match=r"base_weights=.* has neither model\.safetensors"):
        merge(model, tmp_path / "merged", base_weights=tmp_path)
    models.tiny("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(ContractError, match=r"of shape \[32, 32\], but the model's is \[64, 64\]"):
        merge(model, tmp_path / "merged", base_weights=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_other_storages_are_refused_by_name(folder, tmp_path):
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    base = hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ContractError, match="stored as fp4; only nf4 and int8"):
        merge(model, tmp_path / "merged")
