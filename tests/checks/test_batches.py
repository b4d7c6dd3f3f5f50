"""A batch that teaches nothing, or is not a batch, raises an error with the reason."""

import re

import models
import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader

from peftkit import ContractError, check
from peftkit.checks.batches import supervision

_TARGETS = {
    "gpt2": ["c_attn"],
    "phi3": ["qkv_proj"],
    "bert": ["query"],
    "t5": ["q"],
    "vit": ["q_proj"],
    "token classification": ["query"],
    "masked": ["query"],
    "question answering": ["query"],
}


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def _bert(kind):
    config = models.tiny("bert").config
    config.num_labels = 2
    return kind(config)


_OTHERS = {
    "token classification": hf.BertForTokenClassification,
    "masked": hf.BertForMaskedLM,
    "question answering": hf.BertForQuestionAnswering,
}


def _wrapped(name="llama"):
    model = _bert(_OTHERS[name]) if name in _OTHERS else models.tiny(name)
    targets = _TARGETS.get(name, ["q_proj"])
    heads = [n for n in ("classifier", "qa_outputs") if hasattr(model, n)]
    return get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=heads or None))


def _ignored(name="llama"):
    batch = models.batch(name)
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_batch_whose_labels_are_all_ignored(name):
    total = models.batch(name)["labels"].numel()
    shift = " after the shift" if name in models.CAUSAL_NAMES else ""
    with _raises(
        f"0 of {total} label positions are supervised{shift}", "cannot learn from this batch"
    ):
        check(_wrapped(name), _ignored(name))


@pytest.mark.parametrize("name", ["token classification", "masked"])
def test_labels_of_tokens_are_not_shifted(name):
    model = _wrapped(name)
    batch = {**models.batch("bert"), "labels": torch.full((2, 12), -100)}
    with _raises("0 of 24 label positions are supervised, so"):
        check(model, batch)
    batch["labels"][:, 0] = 1
    assert check(model, batch).supervised == 2


def test_answers_after_the_end_of_the_sequence():
    model = _wrapped("question answering")
    ids = models.batch("bert")["input_ids"]
    cut = torch.tensor([12, 40])
    with _raises("0 of 4 label positions are supervised (start_positions and end_positions"):
        check(model, {"input_ids": ids, "start_positions": cut, "end_positions": cut})
    inside = torch.tensor([3, 40])
    report = check(model, {"input_ids": ids, "start_positions": inside, "end_positions": inside})
    assert (report.supervised, report.labels) == (2, 4)
    assert report.notes == ("1 of 2 rows has no supervised label",)


def test_a_supervised_first_token_teaches_a_causal_model_nothing():
    batch = _ignored()
    batch["labels"][:, 0] = 5
    with _raises("0 of 24 label positions are supervised after the shift"):
        check(_wrapped(), batch)
    batch["labels"][0, 1] = 5
    assert check(_wrapped(), batch).supervised == 1


def test_a_first_token_after_prompts_teaches_them():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(models.tiny("llama"), config)
    batch = _ignored()
    batch["labels"][:, 0] = 5
    report = check(model, batch)
    assert report.supervised == 2
    assert report.loss > 0


def test_labels_that_are_shifted_already():
    batch = {**models.batch("llama"), "shift_labels": _ignored()["labels"]}
    with _raises("0 of 24 label positions are supervised (shift_labels)"):
        check(_wrapped(), batch)
    batch["shift_labels"][:, 0] = 5
    assert check(_wrapped(), batch).supervised == 2


@pytest.mark.parametrize("count", [0, torch.tensor(0), -1, float("nan")])
def test_a_number_of_items_that_is_not_positive(count):
    with _raises("num_items_in_batch=", "is divided by"):
        check(_wrapped(), {**models.batch("llama"), "num_items_in_batch": count})


def test_the_number_of_supervised_labels_is_reported():
    batch = models.batch("llama")
    expected = int((batch["labels"][:, 1:] != -100).sum())
    report = check(_wrapped(), batch)
    assert (report.supervised, report.labels, report.notes) == (expected, 24, ())
    assert f"supervised labels: {expected} of 24" in str(report)
    assert check(_wrapped()).supervised is None


def test_rows_without_a_supervised_label_are_noted():
    batch = models.batch("llama")
    batch["labels"][1] = -100
    assert check(_wrapped(), batch).notes == ("1 of 2 rows has no supervised label",)


def test_labels_of_other_losses_are_not_counted():
    config = models.tiny("bert").config
    config.num_labels = 1
    regression = hf.BertForSequenceClassification(config)
    assert supervision(regression, {"labels": torch.tensor([-100, -100])}) is None
    assert supervision(_wrapped(), {"labels": torch.ones(2, 3)}) is None
    assert supervision(_wrapped(), {"input_ids": torch.ones(2, 3).long()}) is None
    assert supervision(torch.nn.Linear(1, 1), {"labels": torch.ones(2).long()}) is None
    labels = {"labels": torch.full((2, 3), -100), "next_sentence_label": torch.ones(2).long()}
    assert supervision(_wrapped("masked"), labels) is None


@pytest.mark.parametrize(
    ("cut", "what"),
    [(lambda t: t[:0], "rows"), (lambda t: t[:, :0], "tokens")],
    ids=["rows", "tokens"],
)
def test_an_empty_batch(cut, what):
    with _raises(f"the batch has no {what}", "batch['input_ids'] has the shape"):
        check(_wrapped(), {name: cut(value) for name, value in models.batch("llama").items()})


def test_a_mask_of_zeros():
    batch = models.batch("llama")
    with _raises("attention_mask masks out every token"):
        check(_wrapped(), {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})


_BATCH = models.batch("llama")
_NO_BATCHES = {
    "a list": ([_BATCH], ("batch is a list of 1 item", "collator")),
    "a tuple": ((_BATCH, _BATCH), ("batch is a tuple of 2 items", "collator")),
    "a loader": (DataLoader([1, 2]), ("batch is a DataLoader", "next(iter(loader))")),
    "an iterator": (iter([_BATCH]), ("batch is a list_iterator", "next(iter(loader))")),
    "a number": (5, ("batch=5 is of type int", "dictionary of tensors")),
    "a text": ("hello", ("batch='hello' is of type str", "dictionary of tensors")),
    "an array": (np.ones((2, 2)), ("is of type ndarray", "dictionary of tensors")),
    "nothing": ({}, ("batch is empty",)),
    "arrays": (
        {name: value.numpy() for name, value in _BATCH.items()},
        ("batch['input_ids'] is a numpy ndarray", "torch.from_numpy"),
    ),
    "lists": (
        {name: value.tolist() for name, value in _BATCH.items()},
        ("batch['input_ids'] is a list of numbers", "torch.tensor", 'return_tensors="pt"'),
    ),
    "no labels": (
        {"input_ids": _BATCH["input_ids"]},
        ("no loss for a batch of input_ids", "labels"),
    ),
}


@pytest.mark.parametrize("name", _NO_BATCHES)
def test_objects_that_are_not_batches(name):
    batch, parts = _NO_BATCHES[name]
    with _raises(*parts):
        check(_wrapped(), batch)


def test_a_column_that_the_forward_does_not_have():
    model = _wrapped()
    model.get_base_model().forward = lambda input_ids, attention_mask, labels: None
    with _raises("does not take this batch of attention_mask, input_ids, labels, text", "'text'"):
        check(model, {**models.batch("llama"), "text": ["a", "b"]})


def test_a_batch_encoding_is_a_batch():
    assert check(_wrapped(), hf.BatchEncoding(models.batch("llama"))).loss > 0


def test_an_object_that_is_not_a_model():
    with _raises("model='id' is of type str, not a model", "peftkit.wrap"):
        check("id")
    with _raises("is of type dict, not a model", "the arguments are swapped"):
        check(models.batch("llama"), _wrapped())
