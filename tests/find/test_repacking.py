"""Evaluation between two steps of training leaves a 4-bit base as it is, on processors where bitsandbytes would repack it."""

import base_cases
import pytest
import torch
from peft import get_peft_model

from peftkit import LoraConfig, accelerate, load_base, merge, restore, wrap
from peftkit.find.repacking import without_repacking

FLAG = "support_avx512bf16_for_cpu"
IDS = torch.arange(24).view(2, 12)


def loaded(folder):
    """A 4-bit Llama as on a processor with AVX512-BF16."""
    model = load_base(base_cases.save_llama(folder, dtype=torch.float32), "nf4")
    for layer in linears(model):
        setattr(layer, FLAG, True)
    return model


def linears(model):
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, FLAG)]


def storage(model):
    return [t.clone() for m in linears(model) for t in (m.weight.data, m.weight.quant_state.absmax)]


def assert_unchanged(model, before):
    assert len(before) == 2 * 14
    assert all(torch.equal(a, b) for a, b in zip(storage(model), before, strict=True))


@pytest.mark.parametrize("how", ["wrap", "accelerate"])
def test_a_wrapped_model_is_evaluated_and_trained_on(tmp_path, how):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    base = loaded(tmp_path)
    model = wrap(base, config) if how == "wrap" else accelerate(get_peft_model(base, config))
    before = storage(model)
    with torch.no_grad(), model.disable_adapter():
        model.eval()(input_ids=IDS)
    assert_unchanged(model, before)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    # the first query is below all other layers
    gradient = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
    assert gradient.abs().sum() > 0
    restore(model)
    assert all(getattr(layer, FLAG) for layer in linears(model))


def test_a_merge_leaves_the_base_of_stock_peft_as_it_is(tmp_path):
    model = get_peft_model(
        loaded(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    before = storage(model)
    merge(model, tmp_path / "merged", min_recovery=None, probe=IDS)
    assert_unchanged(model, before)
    assert all(getattr(layer, FLAG) for layer in linears(model))


def test_the_flags_are_put_back_after_an_error(tmp_path):
    model = loaded(tmp_path)
    linears(model)[0].__dict__[FLAG] = False
    flags = []

    def fail():
        with without_repacking(model):
            flags.extend(getattr(layer, FLAG) for layer in linears(model))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert flags == [False] * 14
    assert [getattr(layer, FLAG) for layer in linears(model)] == [False] + [True] * 13
