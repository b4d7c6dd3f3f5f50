"""The front door: defaults, any config, strictness, what comes later, what is refused."""

import models
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from peftkit import ContractError, accelerate, explain, wrap
from peftkit.fuse.linear import FusedLinear


def fused(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]


def test_without_config_every_backbone_linear_gets_rank_16_and_is_fused():
    model = wrap(models.tiny("llama"))
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (16, 32, "CAUSAL_LM")
    report = explain(model)
    assert report.fused_fraction == 1.0
    assert len(fused(model)) == 14
    assert set(report.left_out) == {"lm_head"}


def test_the_users_config_is_left_alone():
    config = LoraConfig(r=4)
    wrap(models.tiny("llama"), config, adapter_name="mine")
    assert config.target_modules is None


def test_any_peft_config_passes_through_unfused_and_explained():
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = wrap(models.tiny("llama"), config)
    report = explain(model)
    assert report.fused_fraction == 0.0
    assert all(row.reason for row in report.layers if row.is_adapter)
    assert model(**models.batch("llama")).loss.requires_grad


def test_strict_names_what_is_not_fused_and_leaves_the_model_as_it_was():
    model = models.tiny("llama")
    before = {name: (type(module), list(module.__dict__)) for name, module in model.named_modules()}
    trained = [p.requires_grad for p in model.parameters()]
    expected = model(**models.batch("llama")).loss
    config = LoraConfig(
        alora_invocation_tokens=[5], task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
    )
    with pytest.raises(
        ContractError,
        match=r"6 of 13 layers and modules .*(\n.*)*q_proj \(LoRA\): .*ALoraLinearVariant",
    ):
        wrap(model, config, strict=True)
    after = {name: (type(module), list(module.__dict__)) for name, module in model.named_modules()}
    assert after == before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(model(**models.batch("llama")).loss, expected)


def test_strict_accelerate_changes_nothing_when_it_refuses():
    model = get_peft_model(
        models.tiny("llama"), LoraConfig(target_modules=["q_proj"], lora_bias=False)
    )
    model.get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    ).base_layer.weight.requires_grad_()
    with pytest.raises(ContractError, match="1 of 9 layers and modules"):
        accelerate(model, strict=True)
    assert fused(model) == []


def test_strict_is_content_with_layers_the_active_adapter_does_not_reach():
    model = wrap(models.tiny("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("second")
    assert accelerate(model, strict=True) is model
    assert explain(model).fused_fraction == 0.5


def test_an_adapter_added_later_is_fused():
    model = wrap(models.tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj", "gate_proj"]))
    model.set_adapter("second")
    assert len(fused(model)) == 4
    assert explain(model).fused_fraction == 1.0


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute"
)  # of PEFT, for a second adapter
def test_an_adapter_added_by_transformers_is_fused_now_and_later():
    model = models.tiny("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "first")
    accelerate(model)
    assert len(fused(model)) == 2
    model.add_adapter(LoraConfig(target_modules=["v_proj"]), "second")
    assert len(fused(model)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (models.tiny("llama"), LoraConfig(), LoraConfig()), "two LoraConfigs; give one"),
        (lambda: (wrap(models.tiny("llama")),), "is a PeftModel already"),
    ],
    ids=["two configs", "wrapped twice"],
)
def test_refusals_name_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        wrap(*arguments())
