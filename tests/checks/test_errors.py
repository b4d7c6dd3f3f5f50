"""Each test provokes a failure that would be silent. ``check`` or ``wrap`` must raise an error that names the cause."""

import random
import re

import models
import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
)
from peft.tuners.lora import Linear
from task_models import BUILDERS

from peftkit import ContractError, check, wrap

_QV = {"target_modules": ["q_proj", "v_proj"]}
_V = "base_model.model.model.layers.1.self_attn.v_proj"


def _wrapped(name="llama", **settings):
    """A model with stock PEFT, so that these tests only test the checks."""
    return get_peft_model(models.tiny(name), LoraConfig(**{**_QV, **settings}))


def _layer(model) -> Linear:
    return model.get_submodule(_V)


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# Targets


def test_an_unmatched_target_next_to_a_matched_one():
    with _raises("target_modules: 'v_porj' matches nothing", "did you mean 'v_proj'"):
        wrap(models.tiny("llama"), LoraConfig(target_modules=["q_proj", "v_porj"]))


def test_an_unmatched_target_of_a_model_that_stock_peft_accepted():
    model = _wrapped(target_modules=["q_proj", "v_porj"])
    with _raises("target_modules: 'v_porj' matches nothing"):
        check(model)


# Without a batch


def test_a_model_without_adapters():
    with _raises("LlamaForCausalLM has no adapter", "peftkit.wrap"):
        check(models.tiny("llama"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_weight_that_is_not_finite(value):
    model = _wrapped()
    with torch.no_grad():
        _layer(model).lora_A["default"].weight[0, 0] = value
    with _raises("1 adapter tensor has NaN or infinite", f"{_V}.lora_A.default.weight"):
        check(model)


def test_nothing_trainable():
    model = _wrapped()
    model.requires_grad_(False)
    with _raises("no tensor of the active adapters (default) is trainable", "is_trainable=True"):
        check(model)


def test_one_factor_frozen_by_accident():
    model = _wrapped()
    _layer(model).lora_B["default"].weight.requires_grad_(False)
    with _raises("requires_grad=False", f"{_V}.lora_B.default.weight"):
        check(model)


def test_a_factor_frozen_everywhere_is_a_choice():
    model = _wrapped()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert check(model).trainable == 4


def test_a_layer_frozen_as_a_whole_is_noted():
    model = _wrapped()
    _layer(model).requires_grad_(False)
    assert check(model).notes == (f"1 adapter layer is frozen, such as {_V}",)


def test_disabled_adapters():
    model = _wrapped()
    with model.disable_adapter(), _raises("all adapters are disabled"):
        check(model)


def test_merged_adapters():
    model = _wrapped()
    model.merge_adapter()
    with _raises("merged into the base weights of 4 layers", "unmerge_adapter"):
        check(model)


def test_an_active_adapter_that_does_not_exist():
    model = _wrapped()
    for module in model.modules():
        if isinstance(module, Linear):
            module._active_adapter = ["other"]
    model.base_model.active_adapter = "other"
    model.active_adapter = "other"
    with _raises("the active adapter 'other' has no tensors", "default"):
        check(model)


def test_adapter_weights_that_were_never_loaded():
    model = get_peft_model(models.tiny("llama"), LoraConfig(**_QV), low_cpu_mem_usage=True)
    with _raises("8 adapter tensors are on the meta device", "lora_A.default.weight"):
        check(model)


def test_a_dtype_that_cannot_be_trained():
    model = _wrapped()
    weight = _layer(model).lora_A["default"].weight
    _layer(model).lora_A["default"].weight = torch.nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )
    with _raises("dtype that cannot be trained", f"{_V}.lora_A.default.weight: torch.int8"):
        check(model)


def test_factors_of_different_dtypes():
    model = _wrapped()
    _layer(model).lora_B["default"].to(torch.bfloat16)
    with _raises("differ in dtype", _V):
        check(model)


# With a batch


def test_a_sound_model_passes_with_its_numbers():
    model = _wrapped()
    batch = models.batch("llama")
    report = check(model, batch)
    model(**batch).loss.backward()
    assert report.loss == model(**batch).loss.item()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}
    assert report.grad_norms == pytest.approx(norms)
    assert report.notes == ()
    assert f"{report.loss:.6g}" in str(report)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_wrapped_models_of_every_architecture_pass(name, dropout):
    model = wrap(models.tiny(name, dropout=dropout), LoraConfig(lora_dropout=dropout))
    report = check(model, models.batch(name))
    zero = {n for n, norm in report.grad_norms.items() if norm == 0.0}
    assert zero == {n for n in report.grad_norms if "lora_A" in n}


def test_nothing_is_changed_by_a_check():
    model = get_peft_model(models.tiny("llama", dropout=0.3), LoraConfig(**_QV, lora_dropout=0.3))
    batch = models.batch("llama")
    model.register_buffer("calls", torch.zeros(()))

    def count(module, args, output):
        module.calls += 1
        module.eval()

    model.register_forward_hook(count)
    fired = []
    model(**batch).loss.backward()
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(fired.append)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = {
        n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()
    }
    random_states = torch.get_rng_state(), random.getstate()
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }

    check(model, batch)

    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for name, parameter in model.named_parameters():
        gradient, content = gradients[name]
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, content)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert all(module.training for module in model.modules())
    assert {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    } == hooks
    assert fired == []
    model(**batch).loss.backward()
    assert len(fired) == 8


def test_a_batch_without_labels():
    batch = models.batch("llama")
    del batch["labels"]
    with _raises("no loss for a batch of attention_mask, input_ids", "add labels"):
        check(_wrapped(), batch)


def test_a_loss_that_is_nan_names_the_weight_to_blame():
    model = _wrapped()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").weight[3, 3] = float(
            "nan"
        )
    with _raises("the loss of this batch is nan", "model.layers.1.mlp.up_proj.weight has NaN"):
        check(model, models.batch("llama"))


def test_a_loss_that_is_nan_names_the_module_that_made_it():
    model = _wrapped()
    norm = model.get_submodule("base_model.model.model.layers.0.post_attention_layernorm")
    norm.register_forward_hook(lambda module, args, output: output / 0.0 * 0.0)
    with _raises(
        "first NaN occurred in the output of base_model.model.model.layers.0.post_attention_layernorm (LlamaRMSNorm)"
    ):
        check(model, models.batch("llama"))


def test_labels_that_are_all_ignored():
    batch = models.batch("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with _raises("0 of 24 label positions are supervised after the shift", "the collator"):
        check(_wrapped(), batch)


def test_a_gradient_that_is_not_finite():
    model = _wrapped()

    def poison(module, args, output):
        output.register_hook(lambda gradient: gradient * float("inf"))

    _layer(model).register_forward_hook(poison)
    with _raises("gradients are not finite although the loss is", f"{_V}.lora_A.default.weight"):
        check(model, models.batch("llama"))


def test_an_output_that_is_detached():
    model = _wrapped()
    _layer(model).register_forward_hook(lambda module, args, output: output.detach())
    with _raises(
        "2 of 8 trainable tensors get no gradient",
        f"{_V}.lora_A.default.weight",
        "the loss does not depend on the output of its layer",
    ):
        check(model, models.batch("llama"))


def test_a_module_that_the_forward_bypasses():
    model = _wrapped()
    attention = model.get_submodule("base_model.model.model.layers.1.self_attn")
    layer = attention.v_proj
    attention.forward = _bypassing(attention, layer.base_layer)
    with _raises("2 of 8 trainable tensors", f"{_V}.lora_B.default.weight", "did not use it"):
        check(model, models.batch("llama"))


def _bypassing(attention, base_layer):
    forward = attention.forward

    def bypass(*args, **kwargs):
        layer = attention._modules["v_proj"]
        attention._modules["v_proj"] = base_layer
        try:
            return forward(*args, **kwargs)
        finally:
            attention._modules["v_proj"] = layer

    return bypass


def test_an_adapter_that_is_inactive_in_one_layer():
    model = _wrapped()
    layer = _layer(model)
    layer._active_adapter = ["none"]
    with _raises("2 of 8", f"{_V}.lora_A.default.weight"):
        check(model, models.batch("llama"))


def test_a_gradient_that_is_zero_where_it_cannot_be():
    model = _wrapped()
    _layer(model).register_forward_hook(lambda module, args, output: output * 0.0)
    # Without values the attention output is zero for all queries, so q_proj is named too.
    with _raises(
        "2 of 8 trainable",
        f"{_V}.lora_B.default.weight: the gradient at the output of its layer is exactly zero",
    ):
        check(model, models.batch("llama"))


def test_a_factor_whose_gradient_is_cut_off():
    model = _wrapped(init_lora_weights=False)
    layer = _layer(model)
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: output.detach())
    with _raises(
        "1 of 8 trainable", f"{_V}.lora_A.default.weight", "its layer ran but did not use it"
    ):
        check(model, models.batch("llama"))


def test_a_trainable_parameter_outside_the_loss():
    model = _wrapped()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    with _raises("unused: it does not take part in the loss"):
        check(model, models.batch("llama"))


def test_a_loss_without_gradient():
    model = _wrapped()
    model.base_model.model.register_forward_hook(_detach_loss)
    with _raises("the loss does not depend on any trainable tensor", "torch.no_grad()"):
        check(model, models.batch("llama"))


def _detach_loss(module, args, output):
    output.loss = output.loss.detach()
    return output


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_that_cuts_the_gradient_off():
    model = _wrapped()
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()
    with _raises("does not depend on any trainable tensor", "enable_input_require_grads"):
        check(model, models.batch("llama"))
    base.enable_input_require_grads()
    assert check(model, models.batch("llama")).notes == ()


# Zeros that are right


def test_zero_gradients_of_a_single_position_are_noted():
    model = _wrapped()
    ids = torch.tensor([[5]])
    report = check(model, {"input_ids": ids, "labels": ids, "shift_labels": torch.tensor([[7]])})
    assert len(report.notes) == 2
    assert all("q_proj.lora_B" in note and "single position" in note for note in report.notes)


def test_zero_gradients_of_a_scale_of_zero_are_noted():
    model = _wrapped(init_lora_weights=False)
    _layer(model).scaling["default"] = 0.0
    notes = check(model, models.batch("llama")).notes
    assert len(notes) == 2
    assert all(note.startswith(_V) and "scale is 0" in note for note in notes)


def test_zero_gradients_of_a_dropout_of_one_in_one_layer_are_noted():
    model = _wrapped(init_lora_weights=False, lora_dropout=0.5)
    _layer(model).lora_dropout["default"].p = 1.0
    notes = check(model, models.batch("llama")).notes
    assert len(notes) == 2
    assert all(note.startswith(_V) and "dropout is 1" in note for note in notes)
    assert check(model.eval(), models.batch("llama")).notes == ()


def test_layers_dropped_at_random_are_noted():
    model = get_peft_model(models.tiny("opt"), LoraConfig(**_QV))
    model.config.layerdrop = 1.0
    model.base_model.model.model.decoder.layerdrop = 1.0
    model.base_model.model.lm_head.weight.requires_grad_(True)
    notes = check(model, models.batch("opt")).notes
    assert len(notes) == 8
    assert all("dropped at random" in note for note in notes)


def test_tokens_that_are_not_in_the_batch_are_noted():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    notes = check(get_peft_model(models.tiny("llama"), config), models.batch("llama")).notes
    assert len(notes) == 1
    assert "none of its tokens occurs in the batch" in notes[0]


def test_a_bias_whose_gradients_cancel_is_noted():
    """As that of a softmax over positions, of which each has the same bias."""
    model = BUILDERS["bert answers"][0]()
    model = get_peft_model(model, LoraConfig(task_type="QUESTION_ANS", target_modules=["query"]))
    ids = torch.tensor([[5, 6], [7, 8]])
    batch = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 1])}
    model.base_model.model.qa_outputs.register_forward_hook(_cancel)
    (note,) = check(model, {"input_ids": ids, **batch}).notes
    assert "qa_outputs.modules_to_save.default.bias" in note
    assert "cancel" in note


def _cancel(module, args, output):
    """The gradients of two positions add up to zero but for rounding; now they do so exactly."""
    output.register_hook(lambda gradient: gradient - gradient.flip(1))


def test_a_bias_whose_gradients_do_not_cancel():
    model = get_peft_model(
        BUILDERS["bert sequence"][0](), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    )
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.bias.register_hook(torch.zeros_like)
    ids = torch.tensor([[5, 6], [7, 8]])
    with _raises("classifier.modules_to_save.default.bias: its gradient is exactly zero, but"):
        check(model, {"input_ids": ids, "labels": torch.tensor([0, 1])})
