"""Checkpoints that have q, k and v in one tensor, of models that split it while they load it."""

import pytest
import torch
from safetensors.torch import load_file

from peftkit import ContractError, LoraConfig, load_base, merge, wrap
from peftkit.compatibility.batches import training_batch
from peftkit.compatibility.tiny import tiny_model


@pytest.mark.parametrize("kind", ["gte", "nomic_bert"])
def test_the_parts_are_written_as_one_tensor(kind, tmp_path):
    base = tiny_model(kind)
    base.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    batch = training_batch(base)
    # one of the three has an adapter
    (query,) = {n.rpartition(".")[2] for n, _ in base.named_modules() if n.endswith("q_proj")}
    model = wrap(base, LoraConfig(r=4, target_modules=[query]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    probe = {key: value for key, value in batch.items() if key != "labels"}
    found = merge(model, tmp_path / "merged", "fp32", probe=probe)
    assert found.recovery > 0.9999
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == names
    merged = type(base).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_conversions_that_compare_shapes_see_the_model_without_adapters(tmp_path):
    """As those of the experts of Qwen3-VL, whose module is wrapped by PEFT."""
    base = tiny_model("qwen3_vl_moe")
    batch = {key: value for key, value in training_batch(base).items() if key != "labels"}
    model = wrap(base, LoraConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    merge(model, tmp_path / "merged", "fp32", probe=batch)
    merged = type(base).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-4
        )


def test_codes_of_quantised_weights_are_not_joined(tmp_path):
    model = wrap(load_base(tiny_model("gte"), "nf4"), LoraConfig(r=4))
    with pytest.raises(
        ContractError, match=r"dtype='base'.* join or reorder weights .*dtype='bf16'"
    ):
        merge(model, tmp_path / "merged", "base", certificate=False, rounding="nearest")
    assert not (tmp_path / "merged").exists()
