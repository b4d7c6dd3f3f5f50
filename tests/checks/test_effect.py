"""Settings that disable an adapter, and random heads that stay frozen, raise an error."""

import re

import models
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

from peftkit import ContractError, check


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def _wrapped(config=None, **settings):
    config = config or LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(models.tiny("llama"), config)


@pytest.mark.parametrize("batch", [None, models.batch("llama")], ids=["no batch", "batch"])
def test_an_alpha_of_zero(batch):
    with _raises("lora_alpha=0: ", "multiplied by 0", "twice the rank"):
        check(_wrapped(lora_alpha=0), batch)


def test_a_scale_that_was_set_to_zero():
    model = _wrapped()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.0)
    with _raises("every layer of adapter 'default' has a scale of 0", "set_scale"):
        check(model)


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_of_one(training):
    model = _wrapped(lora_dropout=1.0).train(training)
    with _raises("lora_dropout=1.0 of adapter 'default'", "0.05"):
        check(model, models.batch("llama"))


def test_a_dropout_of_whole_modules():
    config = LoHaConfig(target_modules=["q_proj"], module_dropout=1.0)
    with _raises("module_dropout=1.0"):
        check(_wrapped(config))


def test_an_inactive_adapter_is_not_judged():
    model = _wrapped()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], lora_alpha=0))
    assert check(model).adapters == ("default",)
    model.set_adapter("second")
    with _raises("lora_alpha=0"):
        check(model)


def _classifier(**settings):
    model = models.tiny("bert")
    return get_peft_model(model, LoraConfig(target_modules=["query"], **settings))


def test_a_random_head_that_is_frozen():
    with _raises("1 task head is frozen", "  classifier", "modules_to_save=['classifier']"):
        check(_classifier(), models.batch("bert"))


def test_a_head_that_is_trained_or_frozen_on_purpose():
    assert check(_classifier(modules_to_save=["classifier"]), models.batch("bert")).notes == ()
    assert check(_classifier(modules_to_save=[]), models.batch("bert")).notes == ()
    model = _classifier()
    model.get_base_model().classifier.requires_grad_(True)
    assert check(model, models.batch("bert")).notes == ()


def test_a_head_of_a_checkpoint_that_is_frozen_is_noted(tmp_path):
    models.tiny("bert").save_pretrained(tmp_path)
    base = type(models.tiny("bert")).from_pretrained(tmp_path)
    model = get_peft_model(base, LoraConfig(target_modules=["query"]))
    notes = check(model, models.batch("bert")).notes
    assert notes == ("the task head classifier is frozen; it keeps the weights of its checkpoint",)
    assert torch.equal(base.classifier.bias, models.tiny("bert").classifier.bias)
