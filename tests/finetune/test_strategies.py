"""Strategies: which weights are trained, with which learning rate, and when."""

import finetune_cases as cases
import models
import pytest
import torch
from safetensors.torch import load_file

from peftkit import ContractError
from peftkit.finetune import read_recipe, train
from peftkit.finetune.blocks import Places, find_stacks
from peftkit.finetune.rates import parameter_groups
from peftkit.finetune.strategies import AdapterSetting, require_strategy
from peftkit.finetune.strategies.staged import trained_at

ROWS = {"model": "m", "task": "sft", "data": {"train": "d.jsonl"}, "out": "runs/x"}


def prepared(model, strategy, task_type=None):
    recipe = read_recipe(ROWS | {"strategy": strategy})
    chosen = require_strategy(recipe.strategy.name)
    return chosen.apply(model, recipe.strategy.options, AdapterSetting(task_type))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_stacks_of_blocks():
    found = {
        name: [(s.name, s.size) for s in find_stacks(models.tiny(name))] for name in models.NAMES
    }
    assert found["llama"] == [("model.layers", 2)]
    assert found["gpt2"] == [("transformer.h", 2)]
    assert found["t5"] == [("encoder.block", 2), ("decoder.block", 2)]
    assert found["bert"] == [("bert.encoder.layer", 2)]
    assert all(found.values()), found


def test_levels_rise_from_the_embeddings_to_the_head():
    model = models.tiny("bert")
    places = Places(model)
    levels = {name: places.level(name) for name, _ in model.named_parameters()}
    assert levels["bert.embeddings.word_embeddings.weight"] == 0
    assert levels["bert.embeddings.LayerNorm.weight"] == 0
    assert levels["bert.encoder.layer.0.output.dense.weight"] == 1
    assert levels["bert.encoder.layer.1.output.dense.weight"] == 2
    assert levels["classifier.weight"] == 3
    assert places.is_head("classifier.weight")
    llama = models.tiny("llama")
    assert Places(llama).level("model.norm.weight") == 3
    assert Places(llama).level("model.embed_tokens.weight") == 0


def test_full_trains_everything():
    model = prepared(models.tiny("llama"), "full").model
    assert trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"last_blocks": 1, "head": False}, lambda n: n.startswith("bert.encoder.layer.1.")),
        ({}, lambda n: n.startswith("classifier.")),
        ({"biases": True, "head": False}, lambda n: n.endswith(".bias")),
        ({"norms": True, "head": False}, lambda n: "LayerNorm" in n),
        (
            {"pattern": r"layer\.0\.attention.*query", "head": False},
            lambda n: "layer.0.attention.self.query" in n,
        ),
    ],
)
def test_partial_trains_the_selected_part_alone(options, expected):
    model = prepared(models.tiny("bert"), {"name": "partial", **options}).model
    names = {name for name, _ in model.named_parameters() if expected(name)}
    assert names
    assert trained(model) == names


def test_partial_names_what_matches_nothing():
    with pytest.raises(ContractError, match=r"strategy.pattern='layer.7' matches no parameter"):
        prepared(models.tiny("bert"), {"name": "partial", "pattern": "layer.7"})


def test_gradual_unfreezes_from_the_head_down():
    model = models.tiny("bert")
    found = prepared(model, "gradual")
    stages = found.stages(9, 3)
    assert [first for first, _ in stages] == [0, 3, 6]
    assert trained_at(stages, 2) == {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("classifier.", "bert.pooler.", "bert.encoder.layer.1."))
    }
    assert trained_at(stages, 3) - trained_at(stages, 2) == {
        n for n, _ in model.named_parameters() if n.startswith("bert.encoder.layer.0.")
    }
    assert trained_at(stages, 8) == {n for n, _ in model.named_parameters()}


def test_probe_trains_the_head_first():
    model = models.tiny("bert")
    stages = prepared(model, {"name": "probe_then_tune", "probe_steps": 4}).stages(10, 5)
    assert trained_at(stages, 3) == {"classifier.weight", "classifier.bias"}
    assert trained_at(stages, 4) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("lora", {"lora_A", "lora_B"}),
        ({"name": "lora", "use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
        ("bottleneck", {"bottleneck"}),
        ("prefix", {"virtual_tokens"}),
        ({"name": "mix", "lora": {"r": 2}, "prefix": {}}, {"lora_A", "lora_B", "virtual_tokens"}),
        ("ia3", {"ia3_l"}),
    ],
)
def test_adapters_train_their_own_tensors_alone(strategy, parts):
    model = prepared(models.tiny("llama"), strategy, "CAUSAL_LM").model
    names = trained(model)
    assert {part for part in parts if any(part in name for name in names)} == parts
    assert all(any(part in name for part in parts) for name in names), names


def test_rates_of_heads_and_blocks():
    model = prepared(models.tiny("bert"), "full").model
    groups = parameter_groups(model, lr=1.0, head_lr=5.0, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["classifier.weight"] == (5.0, 0.1)
    assert by_name["bert.encoder.layer.1.output.dense.weight"] == (0.5, 0.1)
    assert by_name["bert.encoder.layer.0.output.dense.bias"] == (0.25, 0.0)
    assert by_name["bert.embeddings.word_embeddings.weight"] == (0.125, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(by_name)


def test_rates_of_an_adapter_with_a_head():
    model = prepared(models.tiny("bert"), "lora", "SEQ_CLS").model
    groups = {
        g["name"]: g for g in parameter_groups(model, lr=1.0, head_lr=5.0, lora_plus_ratio=16.0)
    }
    assert groups.keys() == {"body", "lora_B", "head", "head, no decay"}
    assert (groups["lora_B"]["lr"], groups["head"]["lr"]) == (16.0, 5.0)
    heads = {id(p) for n, p in model.named_parameters() if "classifier.modules_to_save" in n}
    assert {id(p) for name in ("head", "head, no decay") for p in groups[name]["params"]} == heads


STRATEGIES = {
    "full": "full",
    "partial": {"name": "partial", "last_blocks": 1},
    "gradual": "gradual",
    "mix": {"name": "mix", "lora": {"r": 2}, "bottleneck": {"reduction_factor": 4}},
    "prefix": {"name": "prefix", "gate": True},
    "dora": {"name": "lora", "r": 2, "use_dora": True},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_changes_what_the_strategy_trains_and_can_be_used(name, tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    values = cases.recipe(
        model,
        "sft",
        data,
        tmp_path / "run",
        strategy=STRATEGIES[name],
        training={"max_steps": 6, "samples": 0},
    )
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "finished: " in printed
    folder = "adapter" if name in ("mix", "prefix", "dora") else "model"
    assert (tmp_path / "run" / folder / "README.md").exists()
    assert cases.run("generate", tmp_path / "run", "say a", "--max-new-tokens", 4)
    if folder == "model":
        from transformers import AutoModelForCausalLM

        before = dict(models.tiny("llama").named_parameters())
        after = dict(
            AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").named_parameters()
        )
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed == (
            {n for n in before if ".layers.1." in n} if name == "partial" else before.keys()
        )


def test_a_gradual_run_leaves_what_is_frozen_untouched(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    strategy = {"name": "gradual", "stage_steps": 2}
    settings = {"max_steps": 8, "stop_after": 2, "samples": 0}
    values = cases.recipe(
        model, "sft", cases.chats(8), tmp_path / "run", strategy=strategy, training=settings
    )
    assert train(values).status == "stopped"
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if name.startswith(("model.layers.1.", "model.norm.", "lm_head."))
    }
