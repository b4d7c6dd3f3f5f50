"""The adapter tensors that ``check`` finds, and the cost of ``check``."""

import cProfile
import pstats

import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import check
from peftkit.checks.adapters import adapter_tensors


def test_every_tensor_is_found_once_with_its_layer_role_and_adapter():
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(models.tiny("bert"), config)
    found = adapter_tensors(model)
    assert {t.name for t in found} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {t.role for t in found} == {"lora_A.weight", "lora_B.weight"} | {
        f"modules_to_save.{leaf}" for leaf in ("weight", "bias")
    }
    assert {t.adapter for t in found} == {"default"}
    assert all(t.name.startswith(f"{t.layer}.") for t in found)


def _calls(layers: int, *, break_it: bool) -> int:
    """The number of Python calls of one ``check``. With ``break_it`` some scales are zero, so that the second pass runs too."""
    config = hf.LlamaConfig(**{**models._DECODER, "num_hidden_layers": layers})
    model = get_peft_model(
        hf.LlamaForCausalLM(config), LoraConfig(target_modules="all-linear", r=2)
    )
    batch = models.batch("llama")
    if break_it:
        for module in model.modules():
            if isinstance(module, hf.models.llama.modeling_llama.LlamaMLP):
                module.gate_proj.scaling["default"] = 0.0
    profile = cProfile.Profile()
    profile.runcall(check, model, batch)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("break_it", [False, True], ids=["one pass", "two passes"])
def test_the_cost_is_linear_in_the_number_of_layers(break_it):
    check(get_peft_model(models.tiny("llama"), LoraConfig(target_modules=["q_proj"])))
    torch.manual_seed(0)
    few, many = (_calls(layers, break_it=break_it) for layers in (4, 16))
    # quadratic cost would be 16 times as much
    assert many < 4.4 * few
