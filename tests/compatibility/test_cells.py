"""Each cell of the matrix detects the bug it tests for, and a small part of the matrix has the expected verdicts."""

import json
from pathlib import Path

import models
import pytest
import torch
import transformers as hf
from compatibility import page
from compatibility.cases import CASES
from torch import nn

from peftkit.bottleneck.module import Bottleneck
from peftkit.compatibility import (
    CELLS,
    METHODS,
    Case,
    Outcome,
    family_case,
    run_cells,
    tiny_model,
)
from peftkit.compatibility import cells as cells_module
from peftkit.compatibility.batches import training_batch

ROOT = Path(__file__).resolve().parents[2]
MERGES = ("LoRA", "rsLoRA", "DoRA", "(IA)³")


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


@pytest.mark.parametrize(("name", "method"), [("llama", "mix"), ("bert", "LoRA")])
def test_a_part_of_the_matrix(name, method):
    found = {cell: outcome.verdict for cell, outcome in run_cells(CASES[name], method).items()}
    expected = dict.fromkeys(CELLS, "yes")
    expected["merge"] = "yes" if method in MERGES else "no"
    expected["generate"] = "-" if name == "bert" else "yes"
    assert found == expected


def test_an_unsupported_method_says_why_in_every_cell():
    found = run_cells(CASES["bloom"], "prefix")
    assert {outcome.verdict for outcome in found.values()} == {"no"}
    assert all("BloomForCausalLM cannot have a KV prefix" in o.why for o in found.values())


def outcome(cell: str, method: str = "Houlsby") -> Outcome:
    return run_cells(CASES["llama"], method, [cell])[cell]


def test_training_too_little_or_too_much_is_detected(monkeypatch):
    forward = Bottleneck.forward
    monkeypatch.setattr(
        Bottleneck, "forward", lambda self, base, x: base + 0 * forward(self, base, x)
    )
    found = outcome("train")
    assert found.verdict == "fails"
    assert "the loss went from" in found.why
    monkeypatch.undo()
    built = []

    def build() -> nn.Module:
        built[:] = [CASES["llama"].build()]
        return built[0]

    step = torch.optim.Adam.step

    def too_much(self, *args, **kwargs):
        built[0].model.norm.weight.data.mul_(1.0001)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", too_much)
    found = run_cells(Case("moved", build), "Houlsby", ["train"])["train"]
    assert (found.verdict, found.why[:24]) == ("fails", "1 frozen tensors changed")


def test_gradients_that_checkpointing_changes_are_detected(monkeypatch):
    calls = []

    def growing(self, base, x):
        calls.append(1)
        return base + len(calls) * self.up(torch.relu(self.down(x)))

    monkeypatch.setattr(Bottleneck, "forward", growing)
    found = outcome("checkpointing")
    assert found.verdict == "fails"
    assert "the gradient of" in found.why


def test_tokens_that_depend_on_the_cache_are_detected(monkeypatch):
    def by_length(self, base, x):
        return base + torch.roll(100 * self.up(torch.relu(self.down(x))), x.shape[1], -1)

    monkeypatch.setattr(Bottleneck, "forward", by_length)
    assert outcome("generate") == Outcome("fails", "tokens with a cache and without differ")


def test_a_changed_adapter_after_loading_is_detected(monkeypatch):
    load = cells_module.load_adapter

    def rounded(*args, **kwargs):
        model = load(*args, **kwargs)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return model

    monkeypatch.setattr(cells_module, "load_adapter", rounded)
    assert "loaded tensors differ" in outcome("save, load").why


def test_an_inexact_merge_is_detected(monkeypatch):
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 0.999 * delta(self, name))
    assert outcome("merge", "LoRA") == Outcome("fails", "the outputs differ")


def test_4_bit_layers_without_gradient_are_detected(monkeypatch):
    forward = Bottleneck.forward
    monkeypatch.setattr(
        Bottleneck, "forward", lambda self, base, x: forward(self, base, x).detach()
    )
    found = outcome("4-bit")
    assert found.verdict == "fails"
    assert found.why.startswith("ContractError")


@pytest.mark.parametrize("name", CASES)
def test_batches_give_a_loss_and_nothing_is_random_in_training(name):
    model = CASES[name].build().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    batch = training_batch(model)
    with torch.no_grad():
        losses = [model(**batch).loss.item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert 0 < losses[0] < 100


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "deepseek_v3", "gpt_neo", "albert"])
def test_tiny_models_of_any_type_are_small_and_the_same_each_time(kind):
    model, again = tiny_model(kind), tiny_model(kind)
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert torch.isfinite(model(**training_batch(model)).loss)


# stages, a table of positions, layers of two kinds in a list, and by period, a start token that the config lacks
@pytest.mark.parametrize("kind", ["convnext", "swin", "qwen3_next", "jamba", "t5"])
def test_a_family_has_a_model_that_computes_a_loss(kind):
    model = family_case(kind).build()
    assert torch.isfinite(model(**training_batch(model)).loss)


def test_a_model_that_fails_without_adapters_is_no_family():
    with pytest.raises(ValueError, match="BambaForCausalLM without adapters cannot compute a loss"):
        family_case("bamba")


def test_a_config_file_names_its_class_and_keeps_sizes_that_are_small(tmp_path):
    model = models.tiny("bert")
    model.save_pretrained(tmp_path)
    again = tiny_model(str(tmp_path))
    assert type(again) is hf.BertForSequenceClassification
    assert again.config.intermediate_size == 48
    assert again.config.num_labels == models.NUM_LABELS


def test_the_committed_page_matches_the_committed_results():
    results = json.loads((ROOT / "docs" / "compatibility.json").read_text())
    assert (ROOT / "docs" / "compatibility.md").read_text() == page.markdown(results)
    assert list(results["families"]) == [case.name for case in CASES.values()]
    assert results["cells"] == list(CELLS)
    for row in results["families"].values():
        assert list(row) == list(METHODS)


def test_the_page_shows_failures_and_numbers_reasons():
    cells = {"train": ["fails", "it broke"], "merge": ["no", "not linear"], "save": ["yes", ""]}
    other = {"train": ["yes", ""], "merge": ["no", "not linear"], "save": ["-", "none"]}
    text = page.markdown(
        {
            "versions": {"peft": "1"},
            "cells": list(cells),
            "families": {"A": {"LoRA": cells}, "B": {"LoRA": other}},
        }
    )
    assert "| A | **1/3** |" in text
    assert "| B | 1/2 |" in text
    assert "| A | **fails** 1 | no 2 | ✓ |" in text
    assert "| B | ✓ | no 2 | – |" in text
    assert "1. it broke\n2. not linear" in text
