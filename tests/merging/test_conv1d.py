"""GPT-2 keeps its weights transposed (``Conv1D``); quantised layers in their place do not, and merged files have them as the model's class."""

import pytest
import torch
import transformers as hf

from peftkit import LoraConfig, load_base, merge, wrap


@pytest.fixture
def folder(tmp_path):
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32, **none)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_the_merged_model_is_the_tuned_one(base, folder, tmp_path):
    loaded = load_base(folder, base, auto_class="AutoModelForCausalLM")
    model = wrap(loaded, LoraConfig(r=4, target_modules=["c_attn"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
    found = merge(model, tmp_path / "merged", "fp32")
    assert found.recovery > 0.9999
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        # in training 8-bit weights are decoded, as in the merge
        tuned = model.train()(input_ids=ids).logits
        merged = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-5)


def test_a_merge_into_the_original_weights(folder, tmp_path):
    loaded = load_base(folder, "nf4", auto_class="AutoModelForCausalLM")
    model = wrap(loaded, LoraConfig(r=4, target_modules=["c_attn"]))  # which changes nothing yet
    merge(model, tmp_path / "merged", "fp32", base_weights=folder, min_recovery=None)
    original, merged = (
        hf.GPT2LMHeadModel.from_pretrained(path).state_dict()
        for path in (folder, tmp_path / "merged")
    )
    for name, tensor in original.items():
        assert torch.equal(merged[name], tensor), name
