"""Every method of PEFT that can be merged: the files hold PEFT's own merge, and the model stays as it was."""

import copy

import merge_cases as cases
import models
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning

from peftkit import BottleneckConfig, ContractError, PrefixConfig, merge, wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


def snapshot(model) -> dict:
    """Identity, version and values of every tensor, and the class and hooks of every module."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (id(tensor), tensor._version, tensor.dtype, tensor.detach().clone())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"{name} (module)"] = (id(module), type(module), module.training, hooks)
    return found


def assert_unchanged(model, before) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, facts in before.items():
        assert after[name][:3] == facts[:3], name
        same = torch.equal if isinstance(facts[3], torch.Tensor) else lambda a, b: a == b
        assert same(after[name][3], facts[3]), name


@pytest.mark.parametrize("method", cases.CONFIGS)
def test_the_files_hold_pefts_own_merge(method, tmp_path):
    model = cases.adapted(method)
    batch = cases.inputs()
    tuned = cases.logits(model, batch)
    before = snapshot(model)
    found = merge(model, tmp_path / "merged", "fp32", probe=batch)
    assert_unchanged(model, before)
    assert torch.equal(cases.logits(model, batch), tuned)

    written, reference = cases.tensors(tmp_path / "merged"), cases.by_peft(model, tmp_path / "peft")
    assert written.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(written[name], tensor), name

    assert found.recovery > 1 - 1e-8
    assert found.outputs.effect > 0.01, "the adapter has no effect: a wrong merge would pass"
    loaded = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.NAMES)
def test_every_architecture(name, tmp_path):
    model = cases.trained(wrap(models.tiny(name), LoraConfig(r=4)))
    batch = cases.inputs(name)
    tuned = cases.logits(model, batch) if name != "t5" else None
    before = snapshot(model)
    found = merge(model, tmp_path / "merged", "fp32", probe=batch)
    assert_unchanged(model, before)
    assert found.recovery > 1 - 1e-8
    assert len(found.layers) == len({layer.name for layer in found.layers}) > 5
    if tuned is not None:
        loaded = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-5)


def test_several_active_adapters(tmp_path):
    model = cases.adapted("DoRA")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    model.add_adapter("unused", LoraConfig(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    cases.trained(model)
    found = merge(model, tmp_path / "merged", "fp32", probe=cases.inputs())
    assert found.facts["adapters"] == {"default": "LORA", "second": "LORA"}
    written, reference = cases.tensors(tmp_path / "merged"), cases.by_peft(model, tmp_path / "peft")
    for name, tensor in reference.items():
        assert torch.equal(written[name], tensor), name
    base = models.tiny("llama").state_dict()
    assert torch.equal(
        written["model.layers.0.self_attn.k_proj.weight"],
        base["model.layers.0.self_attn.k_proj.weight"],
    )


def test_a_transformers_model_with_an_adapter(tmp_path):
    model = models.tiny("llama")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    batch = cases.inputs()
    tuned = cases.logits(cases.trained(model), batch)
    merge(model, tmp_path / "merged", "fp32", probe=batch)
    loaded = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-4)


def test_mixed_adapters(tmp_path):
    model = peft.get_peft_model(
        models.tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]), mixed=True
    )
    model.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "second"])
    batch = cases.inputs()
    tuned = cases.logits(cases.trained(model), batch)
    found = merge(model, tmp_path / "merged", "fp32", probe=batch)
    assert found.recovery > 1 - 1e-8
    loaded = models.tiny("llama").from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-4)


def test_convolutions_and_embeddings_of_images(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["projection", "q_proj"], modules_to_save=["classifier"]
    )
    model = cases.trained(get_peft_model(models.tiny("vit"), config))
    found = merge(model, tmp_path / "merged", "fp32", probe=cases.inputs("vit"))
    assert {layer.method for layer in found.layers} == {
        "lora.Conv2d",
        "lora.Linear",
        "ModulesToSaveWrapper",
    }
    assert found.recovery > 1 - 1e-8


def test_biases_of_the_adapter(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_bias=True)
    model = cases.trained(get_peft_model(models.tiny("gpt2"), config))
    found = merge(model, tmp_path / "merged", "fp32", probe=cases.inputs("gpt2"))
    assert found.recovery > 1 - 1e-8


def test_a_bias_that_the_base_cannot_hold_is_an_error_with_the_layer(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.warns(PeftWarning, match="merging LoRA weights won't be possible"):
        model = cases.trained(get_peft_model(models.tiny("llama"), config))
    before = snapshot(model)
    with pytest.raises(
        ContractError, match=r"PEFT cannot merge the adapter of model\.layers\.0\.self_attn\.q_proj"
    ):
        merge(model, tmp_path / "merged", probe=cases.inputs())
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PrefixConfig(), "PEFTKIT_PREFIX.*cannot be merged"),
        (BottleneckConfig(), "PEFTKIT_BOTTLENECK.*cannot be merged"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PROMPT_TUNING.*cannot be merged: it adds virtual tokens",
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PREFIX_TUNING.*cannot be merged: it adds virtual tokens",
        ),
    ],
)
def test_methods_that_change_no_weight_are_named(config, words, tmp_path):
    model = wrap(models.tiny("llama"), config)
    with pytest.raises(ContractError, match=words):
        merge(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_states_that_cannot_be_merged(tmp_path):
    with pytest.raises(ContractError, match="no adapter layers, so there is nothing to merge"):
        merge(models.tiny("llama"), tmp_path / "merged")
    model = cases.adapted("LoRA")
    model.merge_adapter()
    with pytest.raises(ContractError, match=r"(?s)merged into 14 layers already.*unmerge_adapter"):
        merge(model, tmp_path / "merged")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ContractError, match="adapters are disabled in 14"):
        merge(model, tmp_path / "merged")
    plain = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    )
    with pytest.raises(ContractError, match="writes checkpoints of transformers models"):
        merge(plain, tmp_path / "merged")
    with torch.device("meta"):
        empty = copy.deepcopy(models.tiny("llama")).to("meta")
    empty = get_peft_model(empty, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ContractError, match="offloaded or were never loaded"):
        merge(empty, tmp_path / "merged", certificate=False, rounding="nearest")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_adapter_merges_as_the_one_in_memory(tmp_path):
    model = cases.adapted("LoRA")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.tiny("llama"), tmp_path / "adapter")
    merge(model, tmp_path / "a", "fp32", certificate=False)
    merge(loaded, tmp_path / "b", "fp32", certificate=False)
    a, b = cases.tensors(tmp_path / "a"), cases.tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
