"""Faults planted into the fused ops and the report are found."""

import dataclasses

import pytest
from fuzz.compare import examine
from fuzz.planting import plant
from peft.tuners.lora import LoraModel

import peftkit

LLAMA = {"family": "llama", "seed": 5, "train": True}
CASES = {
    "float64": LLAMA | {"dtype": "float64"},
    "linear": {"family": "linear", "seed": 5, "train": True, "dtype": "float64"},
    "bfloat16": {"family": "linear", "seed": 5, "train": True, "dtype": "bfloat16"},
    "biased": {"family": "gpt2", "seed": 5, "train": True, "dtype": "float64"},
    "masked": LLAMA | {"dtype": "float32", "config.head_dim": 32, "length": 33, "padding": "left"},
    "partly adapted": LLAMA | {"dtype": "float64", "targets": "attention"},
}


@pytest.mark.parametrize("name", CASES)
def test_without_a_planted_fault_nothing_is_found(name):
    assert examine(CASES[name]) is None


def test_a_factor_of_one_per_mille_is_found(monkeypatch):
    plant(monkeypatch, "lora_linear", lambda op: lambda *args, **kw: op(*args, **kw) * 1.001)
    assert examine(CASES["linear"]).kind == "values"


def test_a_factor_of_one_per_cent_is_found_in_bfloat16(monkeypatch):
    plant(monkeypatch, "lora_linear", lambda op: lambda *args, **kw: op(*args, **kw) * 1.01)
    assert examine(CASES["bfloat16"]).kind == "values"


def test_a_dropped_bias_is_found(monkeypatch):
    plant(
        monkeypatch,
        "lora_linear",
        lambda op: lambda x, w, bias, *rest, **kw: op(x, w, None, *rest, **kw),
    )
    assert examine(CASES["biased"]).kind == "values"


def test_an_ignored_mask_is_found(monkeypatch):
    def unmasked(op):
        def call(*args, mask=None, **kw):
            return op(*args, mask=None, **kw)

        return call

    plant(monkeypatch, "attention", unmasked)
    assert examine(CASES["masked"]).kind == "values"


def test_a_skipped_gradient_is_found(monkeypatch):
    plant(monkeypatch, "lora_linear", lambda op: lambda x, *rest, **kw: op(x.detach(), *rest, **kw))
    assert examine(CASES["float64"]).kind in ("values", "names")


def test_a_loss_that_counts_one_token_too_many_is_found(monkeypatch):
    def counting_more(op):
        return lambda *args, **kw: op(*args, **kw) * (13 / 14)

    plant(monkeypatch, "linear_cross_entropy", counting_more)
    assert examine(CASES["float64"]).what == "loss"


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [("float64", "fused:torch", "peft"), ("masked", "fused:torch", "peft")],
)
def test_a_report_that_denies_what_ran_is_found(monkeypatch, case, before, after):
    explain = peftkit.explain

    def lying(model):
        report = explain(model)
        rows = tuple(
            dataclasses.replace(row, path=after) if row.path == before else row
            for row in report.layers
        )
        return dataclasses.replace(report, layers=rows)

    monkeypatch.setattr(peftkit, "explain", lying)
    assert examine(CASES[case]).kind == "report"


def test_a_report_that_claims_what_did_not_run_is_found(monkeypatch):
    explain = peftkit.explain

    def lying(model):
        report = explain(model)
        rows = tuple(dataclasses.replace(row, path="fused:torch") for row in report.layers)
        return dataclasses.replace(report, layers=rows)

    monkeypatch.setattr(peftkit, "explain", lying)
    assert examine(LLAMA | {"dtype": "float64", "lora.lora_bias": True}).kind == "report"


def test_a_class_left_behind_is_found(monkeypatch):
    case = {"family": "llama", "seed": 5, "dtype": "float64", "adapters": "unloaded"}
    original = LoraModel.merge_and_unload

    def leaving(self):
        base = original(self)
        base.__dict__["_peftkit_left"] = True
        return base

    monkeypatch.setattr(LoraModel, "merge_and_unload", leaving)
    assert examine(case).kind == "trace left"
