"""``restore`` leaves no trace: classes, attributes, weights and outputs are those of before ``accelerate``, bit for bit."""

import copy

import models
import pairs
import pytest
import torch
from peft import LoraConfig

from peftkit import accelerate, restore, wrap


def traces(model):
    """What ``accelerate`` might have changed about every module."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {key: type(value) for key, value in module.__dict__.items()},
            module.training,
            {p: (id(v), v.requires_grad) for p, v in module._parameters.items() if v is not None},
        )
        for name, module in model.named_modules()
    }


def outputs(model, name):
    """Logits and loss, and every gradient."""
    batch = pairs.inputs(name)
    result = pairs.step(model, batch)
    model.zero_grad()
    with torch.no_grad():
        return result | {"logits": model(**batch).logits}


@pytest.mark.parametrize("name", models.NAMES)
def test_restored_model_is_the_one_of_before(name):
    model = pairs.stock(name)
    expected, state = outputs(model, name), copy.deepcopy(model.state_dict())
    before = traces(model)
    assert accelerate(model) is model
    changed = traces(model)
    assert changed != before
    accelerate(model)
    outputs(model, name)
    assert restore(model) is model
    assert traces(model) == before
    pairs.assert_equal(model.state_dict(), state)
    pairs.assert_equal(outputs(model, name), expected)
    restore(model)
    assert traces(model) == before


def test_modes_and_requires_grad_are_left_alone():
    model = pairs.stock("llama")
    for i, module in enumerate(model.modules()):
        module.training = bool(i % 3)
    before = traces(model)
    generator = torch.get_rng_state()
    restore(accelerate(model))
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_restored_model_pickles_without_peftkit():
    import pickle

    model = restore(accelerate(pairs.stock("llama")))
    assert b"peftkit" not in pickle.dumps(model)


def test_restore_after_adapters_came_and_went():
    model = accelerate(pairs.stock("llama", target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    model.delete_adapter("default")
    plain = pairs.stock("llama", target_modules=["q_proj"])
    plain.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    plain.set_adapter("second")
    plain.delete_adapter("default")
    restore(model)
    assert {n: v[:3] for n, v in traces(model).items()} == {
        n: v[:3] for n, v in traces(plain).items()
    }
    model.add_adapter("third", LoraConfig(target_modules=["k_proj"]))
    assert not any("peftkit" in str(type(module).__mro__) for module in model.modules())


def test_restore_undoes_wrap_and_a_transformers_adapter():
    wrapped = restore(wrap(models.tiny("llama")))
    own = models.tiny("llama")
    own.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = traces(own)
    accelerate(own)
    assert traces(own) != before
    restore(own)
    assert traces(own) == before
    for model in (wrapped, own):
        assert not any("peftkit" in str(type(module).__mro__) for module in model.modules())


def test_a_model_that_was_never_accelerated():
    model = pairs.stock("llama")
    before = traces(model)
    assert restore(model) is model
    assert traces(model) == before
