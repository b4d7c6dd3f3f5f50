"""What a wrapped model saves, read by plain PEFT in a process that knows nothing of peftkit."""

import models
import peft
import pytest
import torch
from integration.support import (
    ROOT,
    adapter_config,
    fused_calls,
    run_python,
    tiny_peft,
    trainer,
)
from transformers import AutoModelForCausalLM

import peftkit

CHILD = ROOT / "tests" / "integration" / "children" / "load_with_plain_peft.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained model, inputs, the folder both were saved to, and what plain PEFT made of them in its own process."""
    folder = tmp_path_factory.mktemp("saved")
    models.tiny("llama").save_pretrained(folder / "base")
    model = tiny_peft(fused=True)
    trainer(model, folder / "run", max_steps=5, learning_rate=1e-2).train()
    model.eval()
    model.save_pretrained(folder / "adapter")
    inputs = models.batch("llama")
    del inputs["labels"]
    torch.save(inputs, folder / "batch")
    run_python(CHILD, folder / "base", folder / "adapter", folder / "batch", folder / "out")
    return model, inputs, folder, torch.load(folder / "out")


def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(saved):
    model, inputs, _, child = saved
    with torch.no_grad(), fused_calls() as calls:
        logits = model(**inputs).logits
    assert calls["peft"] == 0
    assert calls["lora_qkv"] == 2

    truth_model = peft.get_peft_model(models.tiny("llama", dtype=torch.float64), adapter_config())
    peft.set_peft_model_state_dict(truth_model, peft.get_peft_model_state_dict(model))
    with torch.no_grad():
        truth = truth_model.double().eval()(**inputs).logits
    assert_no_worse_than(logits, child["logits"], truth)
    assert_no_worse_than(logits, child["merged_logits"], truth)


def test_merging_equals_merging_by_plain_peft_bit_for_bit(saved):
    model, _, _, child = saved
    again = tiny_peft(fused=True)
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    merged = again.eval().merge_and_unload()

    assert type(merged) is type(models.tiny("llama"))
    weights = merged.state_dict()
    assert weights.keys() == child["merged"].keys()
    assert all(torch.equal(weights[name], child["merged"][name]) for name in weights)


@pytest.mark.parametrize("how", ["PeftModel.from_pretrained", "load_adapter"])
def test_loaded_adapter_equals_the_saved_model_bit_for_bit(saved, how):
    model, inputs, folder, _ = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if how == "load_adapter":
        loaded = peftkit.load_adapter(base, folder / "adapter")
    else:
        loaded = peftkit.accelerate(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    with torch.no_grad(), fused_calls() as calls:
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert calls["peft"] == 0
    assert calls["lora_qkv"] == 4


def assert_no_worse_than(actual, plain, truth, factor=2.0):
    """The error of ``actual`` is within ``factor`` of that of ``plain``, plus one rounding at the size of the result."""
    floor = torch.finfo(actual.dtype).eps * truth.abs().max()
    allowed = factor * (plain - truth).abs().max() + floor
    assert truth.abs().max() > 10 * allowed, "inputs too small: a wrong result would pass"
    assert (actual - truth).abs().max() <= allowed
