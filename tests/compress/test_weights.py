"""Zeros in the weights of a model: the smallest ones, in inner linear layers only, in an ordinary checkpoint."""

import json

import finetune_cases as cases
import models
import pytest
import torch
import transformers as hf
from safetensors import safe_open

import peftkit
from peftkit import ContractError
from peftkit.compress.weights import smaller_half, smallest
from peftkit.finetune import train


def load(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def test_the_smallest_weights_are_exactly_the_share():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.0], [1.0, -4.0, 1.0, 5.0]])
    assert smallest(weight, 0.25).tolist() == [[False, True, False, True], [False] * 4]
    # 1.0 is there three times; the first of them are smaller.
    assert smallest(weight, 0.375).tolist()[1] == [True, False, False, False]
    assert smallest(weight, 0.5).sum() == 4
    assert smallest(weight.bfloat16(), 0.5).equal(smallest(weight, 0.5))
    assert not smallest(weight, 0.01).any()
    assert smallest(torch.zeros(2, 3), 0.5).sum() == 3


def test_a_pattern_keeps_the_larger_half_of_each_group():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert smaller_half(weight, 4).tolist() == [
        [False, True, False, True, True, True, False, False]
    ]
    assert smaller_half(weight, 8).sum() == 4


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("way", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["share", "2:4"])
def test_inner_linears_have_zeros_and_the_rest_is_the_same(name, dtype, way, tmp_path):
    source = tmp_path / "m"
    models.tiny(name).to(dtype).save_pretrained(source)
    report = peftkit.prune(source, tmp_path / "p", **way, max_shard_size=20000)
    before, after = hf.AutoModelForCausalLM.from_pretrained(source), load(tmp_path / "p")
    assert after.dtype == dtype
    names = {layer.name for layer in report.layers}
    inner = ("q_proj", "down_proj") if name == "llama" else ("c_attn", "c_fc")
    assert {n.rpartition(".")[2] for n in names} >= set(inner)
    assert not any("embed" in n or "lm_head" in n or "wte" in n for n in names)
    for key, tensor in before.state_dict().items():
        found = after.state_dict()[key]
        if key.removesuffix(".weight") not in names or key.endswith("bias"):
            assert found.equal(tensor), key
            continue
        zeros = found == 0
        assert zeros.float().mean() == 0.5
        assert found[~zeros].equal(tensor[~zeros])
        rows = (found.T if name == "gpt2" else found).contiguous()
        if "pattern" in way:
            assert (rows.view(-1, 4) == 0).sum(1).eq(2).all()
        else:
            assert tensor.abs()[zeros].max() <= tensor.abs()[~zeros].min()
    for layer in report.layers:
        whole, left = (m.get_submodule(layer.name).weight.double() for m in (before, after))
        assert layer.error == pytest.approx(((whole - left).norm() / whole.norm()).item(), rel=1e-6)
        assert layer.energy == pytest.approx(1 - layer.error**2, rel=1e-6)
        assert (layer.before, layer.after) == (0, 0.5)
    assert report.numbers_after * 2 == report.numbers_before
    assert len(list((tmp_path / "p").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "p" / "prune.json").read_text()) == report.to_dict()


def test_a_pattern_that_does_not_fit_leaves_the_layer(tmp_path):
    config = models.tiny("llama").config
    config.intermediate_size = 50
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    report = peftkit.prune(tmp_path / "m", tmp_path / "p", pattern="2:4")
    kept = [n for n, reason in report.kept.items() if reason == "its inputs are no multiple of 4"]
    assert kept == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert load(tmp_path / "p").model.layers[0].mlp.down_proj.weight.all()
    assert "kept: 2 (its inputs are no multiple of 4)" in str(report)


def test_tied_embeddings_stay_tied(tmp_path):
    config = models.tiny("llama").config
    config.tie_word_embeddings = True
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    peftkit.prune(tmp_path / "m", tmp_path / "p", sparsity=0.9)
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    found = load(tmp_path / "p")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.lm_head.weight[1:].all()  # the first row is that of the padding


def test_a_classifier_keeps_its_head(tmp_path):
    torch.manual_seed(0)
    config = models.tiny("bert").config
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    report = peftkit.prune(tmp_path / "m", tmp_path / "p", sparsity=0.5)
    assert "classifier" in report.kept
    found = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "p")
    assert found.classifier.weight.all()
    assert (found.bert.encoder.layer[0].output.dense.weight == 0).float().mean() == 0.5


def test_what_cannot_be_pruned_is_refused(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "m")
    peftkit.prune(tmp_path / "m", tmp_path / "p", sparsity=0.5)
    quantised = peftkit.load_base(tmp_path / "m", "int8")
    quantised.save_pretrained(tmp_path / "q")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, way, message in (
        ("p", {"sparsity": 0.4}, r"sparsity=0\.4 makes no zeros in .*each of its 14 layers has at least 50\.0% already"),
        ("q", {"sparsity": 0.5}, "is quantised .int8., and its codes have no zeros to set"),
        ("m", {"rank": 2}, "is a model, which has no ranks"),
        ("m", {"pattern": "1:3"}, "pattern='1:3' is unknown; use 2:4 or 4:8"),
        ("m", {"sparsity": 1.0}, r"sparsity=1\.0 must be between 0 and 1"),
        ("none", {"sparsity": 0.5}, "cannot be loaded"),
    ):  # fmt: skip
        with pytest.raises(ContractError, match=message):
            peftkit.prune(tmp_path / source, tmp_path / "x", **way)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_is_measured_before_and_after(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(12))
    training = {"max_steps": 12, "samples": 0, "lr": 3e-3}
    train(cases.recipe(model, "sft", rows, tmp_path / "run", strategy="full", training=training))
    printed = cases.run(
        "prune", tmp_path / "run", tmp_path / "p", "--sparsity", 0.7, "--data", rows
    )
    assert "sparsity=0.7: 14 layers" in printed
    report = json.loads((tmp_path / "p" / "prune.json").read_text())
    assert report["before"] == peftkit.evaluate(tmp_path / "run", str(rows))
    assert report["after"]["loss"] > report["before"]["loss"]
    assert (tmp_path / "p" / "tokenizer.json").is_file()
    assert "Made smaller by" in (tmp_path / "p" / "README.md").read_text()
