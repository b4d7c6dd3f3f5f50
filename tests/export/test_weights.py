"""The merged weights: those of PEFT's merge_and_unload, from a model that stays as it is."""

import copy

import models
import peft
import pytest
import torch

from peftkit import BottleneckConfig, ContractError, LoraConfig, PrefixConfig, wrap
from peftkit.export.weights import merged_weights


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def lora(**fields) -> LoraConfig:
    fields = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    } | fields
    return LoraConfig(**fields)


def state(model):
    return {w.name: w.load().clone() for w in merged_weights(model)}


def expected(model):
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True, lora_alpha=3),
        lora(use_rslora=True, rank_pattern={"q_proj": 2}),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[3, 5]),
        peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["lora", "dora", "rslora", "head", "tokens", "loha", "ia3"],
)
@pytest.mark.parametrize("fused", [True, False])
def test_they_are_those_of_merge_and_unload(config, fused):
    model = models.tiny("llama")
    adapted = wrap(model, config) if fused else peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():  # also those that start at zero
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    before = {name: (t, t.clone()) for name, t in adapted.state_dict().items()}
    found = state(adapted)
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(after[name], values), name
    wanted = expected(adapted)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight.detach(), msg=name)
    changed = [
        n for n, p in models.tiny("llama").named_parameters() if not torch.equal(found[n], p)
    ]
    assert changed
    assert all(w.shape == tuple(wanted[w.name].shape) for w in merged_weights(adapted))


def test_the_layer_can_be_used_afterwards():
    model = wrap(models.tiny("llama"), lora())
    batch = models.batch("llama")
    with torch.no_grad():
        before = model(batch["input_ids"]).logits
        state(model)
        assert torch.equal(model(batch["input_ids"]).logits, before)


def test_bfloat16_is_merged_in_float32():
    model = wrap(models.tiny("llama").to(torch.bfloat16), lora())
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    found = state(model)[name]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, exact)
    assert layer.base_layer.weight.dtype is torch.bfloat16


def test_disabled_and_merged_adapters():
    model = wrap(models.tiny("llama"), lora())
    plain = dict(models.tiny("llama").named_parameters())
    merged = expected(model)
    with model.disable_adapter():
        found = state(model)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    model.merge_adapter()
    found = state(model)
    for name in plain:
        torch.testing.assert_close(found[name], merged[name].detach())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixConfig(), "is not linear in the layer's input"),
        (BottleneckConfig(bottleneck_size=4), "is not linear in the layer's input"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "a prompt is not part of the weights",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(config, message):
    model = models.tiny("llama")
    own = isinstance(config, (PrefixConfig, BottleneckConfig))
    adapted = wrap(model, config) if own else peft.get_peft_model(model, config)
    with pytest.raises(ContractError, match=message):
        merged_weights(adapted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_decoded(kind):
    import bitsandbytes as bnb

    model = models.tiny("llama")
    linear = model.model.layers[0].mlp.down_proj
    if kind == "nf4":
        new = bnb.nn.Linear4bit(48, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(48, 32, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
    model.model.layers[0].mlp.down_proj = new.to("cpu")
    setattr(model, f"is_loaded_in_{'4' if kind == 'nf4' else '8'}bit", True)
    name = "model.layers.0.mlp.down_proj.weight"
    decoded = state(model)[name]
    assert decoded.shape == linear.weight.shape
    step = linear.weight.abs().max().item()
    assert 0 < (decoded - linear.weight).abs().max() < step / (6 if kind == "nf4" else 100)
    adapted = peft.get_peft_model(model, lora(target_modules=["down_proj"]))
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    delta = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else None
    found = state(adapted)[name]
    torch.testing.assert_close(found, decoded.float() + delta.float())
    dora = peft.get_peft_model(adapted.unload(), lora(target_modules=["down_proj"], use_dora=True))
    with pytest.raises(ContractError, match="only plain LoRA on a quantised weight"):
        state(dora)
