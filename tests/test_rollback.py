"""Whatever a block does to a model, an exception undoes it."""

import copy
import time

import models
import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from unchanged import differences, everything

from peftkit import BottleneckConfig, PrefixConfig, wrap
from peftkit.rollback import restoring, writes_base_weights


class _Stop(BaseException):
    """Not an ``Exception``, as an interrupt by the user is not."""


def _run(model, change, **options):
    """Run ``change``, stop it, and say what is different then; it must have changed something before."""
    before = everything(model)

    def interrupted():
        with restoring(model, **options):
            change(model)
            assert differences(before, everything(model))
            raise _Stop

    with pytest.raises(_Stop):
        interrupted()
    return differences(before, everything(model))


_Q = {"target_modules": ["q_proj"]}
_CONFIGS = {
    "lora": LoraConfig(**_Q),
    "all-linear": LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]),
    "dora": LoraConfig(**_Q, use_dora=True),
    "biases": LoraConfig(**_Q, bias="all"),
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "tokens": LoraConfig(**_Q, trainable_token_indices=[3, 4]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "replication": LoraConfig(**_Q, layer_replication=[[0, 2], [1, 2]]),
    "pissa": LoraConfig(**_Q, init_lora_weights="pissa"),
    "olora": LoraConfig(**_Q, init_lora_weights="olora"),
    "loha": LoHaConfig(**_Q),
    "vera": VeraConfig(**_Q, r=4),
    "oft": OFTConfig(**_Q, oft_block_size=8, use_cayley_neumann=False),
    "adalora": AdaLoraConfig(**_Q, total_step=10),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "past": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "adaption prompt": AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, target_modules="self_attn", task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_an_injection_by_peft_is_undone(name):
    config = copy.deepcopy(_CONFIGS[name])
    changed = _run(
        models.tiny("llama"),
        lambda model: get_peft_model(model, config),
        copy_values=writes_base_weights(config),
    )
    assert changed == []


@pytest.mark.parametrize(
    "configs",
    [(), (PrefixConfig(),), (BottleneckConfig(),), (LoraConfig(), PrefixConfig())],
    ids=["lora", "prefix", "bottleneck", "mix"],
)
def test_what_wrap_does_is_undone(configs):
    assert _run(models.tiny("llama"), lambda model: wrap(model, *configs)) == []


def test_a_second_adapter_is_undone_and_the_same_name_is_free_again():
    model = wrap(models.tiny("llama"))
    model(**models.batch("llama")).loss.backward()
    batch = models.batch("llama")
    before = model(**batch).logits
    assert _run(model, lambda m: m.add_adapter("second", LoraConfig(**_Q))) == []
    assert torch.equal(model(**batch).logits, before)
    model.add_adapter("second", LoraConfig(**_Q))
    assert sorted(model.peft_config) == ["default", "second"]


def _reassign(model):
    model.lm_head.weight.data = torch.zeros(3, 5, dtype=torch.float64)


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.enable_input_require_grads()


def _gradients(model):
    model(**models.batch("llama")).loss.backward()


def _parametrise(model):
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())


def _shadow(model):
    model.forward = lambda **_: None
    model.lm_head.weight.note = "new"


def _in_place(model):
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)


_CHANGES = {
    "storage": _reassign,
    "hooks": _hook,
    "gradients": _gradients,
    "flags": lambda model: model.requires_grad_(False),
    "modes": lambda model: model.model.layers[1].eval(),
    "parametrisation": _parametrise,
    "class": lambda model: setattr(model.model.norm, "__class__", nn.Module),
    "attributes": _shadow,
    "a submodule": lambda model: setattr(model.model, "layers", nn.ModuleList()),
    "order": lambda model: model._modules.update(model=model._modules.pop("model")),
    "the config": lambda model: model.config.update({"pretraining_tp": 7, "use_cache": False}),
    "the random state": lambda model: torch.manual_seed(5),
    "a buffer": lambda model: model.model.rotary_emb.register_buffer("inv_freq", torch.ones(2)),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_any_other_change_is_undone(name):
    assert _run(models.tiny("llama"), _CHANGES[name]) == []


def test_values_written_in_place_are_restored_from_copies_alone():
    assert _run(models.tiny("llama"), _in_place, copy_values=True) == []
    assert _run(models.tiny("llama"), _in_place) == ["parameter lm_head.weight, values"]


def test_hooks_can_still_be_removed():
    model = models.tiny("llama")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    _run(model, lambda m: m.lm_head._forward_hooks.clear())
    handle.remove()
    assert not model.lm_head._forward_hooks


def test_a_list_that_is_shared_between_modules_keeps_its_identity():
    model = models.tiny("llama")
    shared = [1, {2}]
    model.kept = model.lm_head.kept = shared

    def change(m):
        m.kept.append(3)
        m.kept[1].add(4)

    assert _run(model, change) == []
    assert model.kept is model.lm_head.kept is shared
    assert shared == [1, {2}]


def test_a_block_that_completes_is_left_alone():
    model = models.tiny("llama")
    with restoring(model):
        wrapped = get_peft_model(model, LoraConfig(**_Q))
    assert wrapped.peft_config["default"].target_modules == {"q_proj"}
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_inits_that_write_base_weights():
    config = LoraConfig()
    for init in (True, False, "gaussian", "eva", "orthogonal"):
        config.init_lora_weights = init
        assert not writes_base_weights(config)
    for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "not known here"):
        config.init_lora_weights = init
        assert writes_base_weights(config)
    assert not writes_base_weights(IA3Config())


def test_the_cost_is_linear():
    def seconds(layers):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            with restoring(model):
                pass
            best = min(best, time.perf_counter() - start)
        return best

    # quadratic cost would be 64 times as much
    assert seconds(2048) < 24 * seconds(256)
