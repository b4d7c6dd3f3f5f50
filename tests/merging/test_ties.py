"""Tied embeddings, trained heads, trained tokens and resized vocabularies in the merged files."""

import json

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import merge

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(**changes):
    config = models.tiny("llama").config
    config.tie_word_embeddings = True
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def merged(model, folder, dtype="fp32"):
    batch = cases.inputs()
    tuned = cases.logits(model, batch)
    found = merge(model, folder, dtype, probe=batch)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    return found, cases.tensors(folder), config


def test_ties_stay_without_an_adapter_on_them(tmp_path):
    model = cases.trained(get_peft_model(tied(), LoraConfig(r=4, target_modules=["q_proj"])))
    found, files, config = merged(model, tmp_path / "merged")
    assert HEAD not in files
    assert config["tie_word_embeddings"] is True
    assert found.facts["untied"] == []


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_them_unties(target, tmp_path):
    base = tied()
    before = base.lm_head.weight.detach().clone()
    config = LoraConfig(r=4, target_modules=["q_proj", target])
    model = cases.trained(get_peft_model(base, config))
    plain, changed = (HEAD, EMBEDDING) if target == "embed_tokens" else (EMBEDDING, HEAD)
    layer = model.base_model.model.get_submodule(changed.removesuffix(".weight"))
    wanted = before + layer.get_delta_weight("default")
    found, files, config = merged(model, tmp_path / "merged")
    assert torch.equal(files[plain], before)
    torch.testing.assert_close(files[changed], wanted)
    assert not torch.equal(files[changed], before)
    assert config["tie_word_embeddings"] is False
    assert sorted(found.facts["untied"][0]) == sorted([HEAD, EMBEDDING])
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(
            r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
        ),
        lambda: LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5], ensure_weight_tying=True
        ),
        lambda: LoraConfig(
            r=4,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ],
    ids=["LoRA", "tokens", "whole"],
)
def test_adapters_that_are_tied_keep_the_tie(config, dtype, tmp_path):
    model = cases.trained(get_peft_model(tied(), config()), size=0.02)
    batch = cases.inputs()
    tuned = cases.logits(model, batch)
    merge(model, tmp_path / "merged", dtype, probe=batch)
    files = cases.tensors(tmp_path / "merged")
    assert HEAD not in files
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    close = 1e-4 if dtype == "fp32" else 0.05
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=close, atol=close)


def test_a_trained_head_is_written_and_the_config_says_so(tmp_path):
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    model = cases.trained(get_peft_model(models.tiny("bert"), config))
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    merge(model, tmp_path / "merged", "fp32", probe=cases.inputs("bert"))
    files = cases.tensors(tmp_path / "merged")
    assert torch.equal(files["classifier.weight"], head)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert loaded.config.num_labels == models.NUM_LABELS


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
def test_a_resized_vocabulary_is_kept(saved, tmp_path):
    base = models.tiny("llama")
    base.resize_token_embeddings(models.VOCAB_SIZE + 5, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = cases.trained(get_peft_model(base, config))
    _, files, config = merged(model, tmp_path / "merged")
    assert config["vocab_size"] == models.VOCAB_SIZE + 5
    assert files[EMBEDDING].shape[0] == files[HEAD].shape[0] == models.VOCAB_SIZE + 5


def test_t5_shares_three_embeddings(tmp_path):
    config = LoraConfig(r=4, target_modules=["q", "v"])
    model = cases.trained(get_peft_model(models.tiny("t5"), config))
    merge(model, tmp_path / "merged", "fp32", probe=cases.inputs("t5"))
    assert (
        cases.tensors(tmp_path / "merged").keys() == cases.by_peft(model, tmp_path / "peft").keys()
    )
