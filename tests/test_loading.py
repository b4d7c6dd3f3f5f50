"""A checkpoint that does not fit is refused, and the model stays what it was, bit for bit; one that fits loads."""

import copy
import json
import re
import shutil

import models
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from unchanged import differences, everything

from peftkit import ContractError, check, load_adapter, wrap
from peftkit.compatibility.tiny import tiny_model

_QV = {"target_modules": ["q_proj", "v_proj"]}
_V = "base_model.model.model.layers.1.self_attn.v_proj"


def _wrapped(**settings):
    return get_peft_model(models.tiny("llama"), LoraConfig(**{**_QV, **settings}))


def _layer(model) -> Linear:
    return model.get_submodule(_V)


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a tiny Llama, with factors that are not zero."""
    _wrapped(init_lora_weights=False).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


_KEY = f"{_V}.lora_A.weight"
_DAMAGE = {
    "missing": (lambda t: t.pop(_KEY), ("1 of 8 keys is missing", _KEY)),
    "unexpected": (
        lambda t: t.update({_KEY.replace("v_proj", "o_proj"): t[_KEY].clone()}),
        ("1 key is left over", _KEY.replace("v_proj", "o_proj")),
    ),
    "shape": (
        lambda t: t.update({_KEY: torch.ones(4, 32)}),
        (f"{_KEY}: [4, 32] in the checkpoint, [8, 32] in the model",),
    ),
    "nan": (
        lambda t: t[_KEY].fill_(float("nan")),
        ("1 tensor of", "holds NaN or infinite values", _KEY),
    ),
}


@pytest.mark.parametrize("kind", ["base", "peft", "fused"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(saved, damage, kind):
    change, parts = _DAMAGE[damage]
    _rewrite(saved, change)
    build = {
        "base": lambda: models.tiny("llama"),
        "peft": lambda: _wrapped(target_modules=["q_proj"]),
        "fused": lambda: wrap(models.tiny("llama")),
    }
    model = build[kind]()
    before = everything(model)
    with _raises(*parts):
        load_adapter(model, saved, "second")
    assert differences(before, everything(model)) == []


def test_many_keys_are_counted_and_the_first_shown(saved):
    _rewrite(saved, lambda t: [t.pop(k) for k in list(t)[:7]])
    with _raises("7 of 8 keys are missing", "... and 2 more"):
        load_adapter(models.tiny("llama"), saved)


def test_a_checkpoint_of_another_model(saved):
    with _raises("cannot be applied to GPT2LMHeadModel", "q_proj"):
        load_adapter(models.tiny("gpt2"), saved)


def test_a_checkpoint_of_another_size(saved):
    import transformers as hf

    wider = hf.LlamaForCausalLM(hf.LlamaConfig(**{**models._DECODER, "hidden_size": 64}))
    with _raises("tensors have the wrong shape", "[8, 32] in the checkpoint, [8, 64] in the model"):
        load_adapter(wider, saved)


def test_a_folder_that_does_not_exist(tmp_path):
    with _raises("is not a folder", "snapshot_download"):
        load_adapter(models.tiny("llama"), tmp_path / "nothing")


def test_a_missing_config(saved):
    (saved / "adapter_config.json").unlink()
    with _raises("adapter_config.json does not exist", "adapter_model.safetensors"):
        load_adapter(models.tiny("llama"), saved)


def test_a_config_without_a_method(saved):
    (saved / "adapter_config.json").write_text("{}")
    with _raises("adapter_config.json is not a PEFT config", "has no peft_type"):
        load_adapter(models.tiny("llama"), saved)


def _configure(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("peft_type", ["LORRA", ["LORA"], {}, 1, None])
def test_an_unknown_peft_type(saved, peft_type):
    _configure(saved, peft_type=peft_type)
    with _raises(f"peft_type={peft_type!r} is unknown", "LORA"):
        load_adapter(models.tiny("llama"), saved)


_REFUSED_CONFIGS = {
    "a late failure": ({"init_lora_weights": "nope"}, ("nope",)),
    "a rank without memory for it": ({"r": 10**12}, ("r=1000000000000: ", "elements in all")),
    "a rank of another size": ({"r": 60_000}, ("[8, 32] in the checkpoint, [60000, 32]",)),
    "one rank of a pattern": ({"rank_pattern": {"q_proj": 40_000}}, ("[40000, 32] in the model",)),
    "a wrong type": ({"rank_pattern": "q"}, ("rank_pattern='q': PEFT expects Optional[dict]",)),
    "an invalid task": ({"task_type": "CHAT"}, ("Invalid task type", "CHAT")),
}


@pytest.mark.parametrize("kind", ["base", "fused"])
@pytest.mark.parametrize("name", _REFUSED_CONFIGS)
def test_a_config_that_fails_late_leaves_nothing_behind(saved, name, kind):
    fields, parts = _REFUSED_CONFIGS[name]
    good = (saved / "adapter_config.json").read_text()
    _configure(saved, **fields)
    model = models.tiny("llama") if kind == "base" else wrap(models.tiny("llama"))
    before = everything(model)
    with _raises(str(saved), *parts):
        load_adapter(model, saved, "second")
    assert differences(before, everything(model)) == []
    (saved / "adapter_config.json").write_text(good)
    load_adapter(model, saved, "second")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_base_weights_that_an_init_decomposed_are_put_back(tmp_path, init):
    _wrapped(init_lora_weights=init).save_pretrained(tmp_path)
    model = models.tiny("llama")
    before = everything(model)
    _rewrite(tmp_path, lambda t: t.pop(_KEY))
    with _raises("1 of 8 keys is missing"):
        load_adapter(model, tmp_path)
    assert differences(before, everything(model)) == []


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=lambda d: str(d)[6:]
)
def test_numbers_that_a_cast_would_cut(saved, dtype):
    _rewrite(saved, lambda t: t.update({_KEY: t[_KEY].to(dtype)}))
    with _raises("1 tensor has the wrong kind of numbers", f"{_KEY}: {dtype}", "torch.float32"):
        load_adapter(models.tiny("llama"), saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_load_as_in_peft(saved, dtype):
    _rewrite(saved, lambda t: t.update({_KEY: t[_KEY].to(dtype)}))
    ours = load_adapter(models.tiny("llama"), saved, accelerate=False)
    theirs = PeftModel.from_pretrained(models.tiny("llama"), str(saved))
    weights = [_layer(m).lora_A["default"].weight for m in (ours, theirs)]
    assert weights[0].dtype is torch.float32
    assert torch.equal(*weights)


def test_values_that_become_infinite_in_the_model(tmp_path):
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(models.tiny("bert"), config).save_pretrained(tmp_path)
    _rewrite(tmp_path, lambda t: t["base_model.model.classifier.weight"].fill_(1e6))
    with _raises("1 tensor has too large values", "classifier.weight: 1e+06", "torch.float16"):
        load_adapter(models.tiny("bert", dtype=torch.float16), tmp_path)


def test_swapped_arguments(saved):
    with _raises("the arguments are swapped", "LlamaForCausalLM", "load_adapter(model, path)"):
        load_adapter(saved, models.tiny("llama"))


def test_a_name_where_a_model_is_expected(saved):
    with _raises("model='meta-llama/Llama-3.2-1B' is of type str", "from_pretrained"):
        load_adapter("meta-llama/Llama-3.2-1B", saved)


@pytest.mark.parametrize("path", [None, 5, ["a"]])
def test_a_path_of_another_type(path):
    with _raises(f"path={path!r} is of type {type(path).__name__}, not a path"):
        load_adapter(models.tiny("llama"), path)


def test_prompts_cannot_be_trained_further(tmp_path):
    get_peft_model(models.tiny("llama"), copy.deepcopy(_METHODS["prompt"])).save_pretrained(
        tmp_path
    )
    with _raises("is_trainable=True", "prompt-learning"):
        load_adapter(models.tiny("llama"), tmp_path, is_trainable=True)


def test_a_model_that_fails_while_it_is_fused_is_left_as_it_was(saved, monkeypatch):
    def fail(model):
        raise RuntimeError("planted")

    monkeypatch.setattr("peftkit.loading.fuse_model", fail)
    model = models.tiny("llama")
    before = everything(model)
    with pytest.raises(RuntimeError, match="planted"):
        load_adapter(model, saved)
    assert differences(before, everything(model)) == []


def test_missing_weights(saved):
    (saved / "adapter_model.safetensors").unlink()
    with _raises("holds none of adapter_model.safetensors, adapter_model.bin"):
        load_adapter(models.tiny("llama"), saved)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_damaged_weights(saved, name):
    content = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").unlink()
    (saved / name).write_bytes(content[: len(content) // 2])
    with _raises(f"{name} cannot be read", "damaged or incomplete"):
        load_adapter(models.tiny("llama"), saved)


def test_a_name_that_is_taken(saved):
    with _raises("adapter_name='default' is already in the model", "delete_adapter"):
        load_adapter(_wrapped(), saved)


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3])
def test_a_name_that_pytorch_would_refuse(saved, name):
    with _raises(f"adapter_name={name!r}"):
        load_adapter(models.tiny("llama"), saved, name)


def test_a_base_model_that_still_carries_layers(saved):
    with _raises("already has adapter layers but is not a PeftModel"):
        load_adapter(_wrapped().get_base_model(), saved)


@pytest.mark.parametrize("accelerate", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_sound_checkpoint_loads(saved, accelerate, binary):
    tensors = load_file(saved / "adapter_model.safetensors")
    if binary:
        torch.save(tensors, saved / "adapter_model.bin")
        (saved / "adapter_model.safetensors").unlink()
    model = load_adapter(models.tiny("llama"), saved, is_trainable=True, accelerate=accelerate)
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    assert hasattr(_layer(model), "peftkit_verdict") == accelerate
    assert check(model, models.batch("llama")).trainable == 8


def test_a_second_adapter_loads_next_to_the_first(saved):
    model = wrap(models.tiny("llama"))
    load_adapter(model, saved, "second")
    assert sorted(model.peft_config) == ["default", "second"]
    assert model.active_adapters == ["default"]
    tensors = load_file(saved / "adapter_model.safetensors")
    assert torch.equal(_layer(model).lora_A["second"].weight, tensors[_KEY])


def test_saved_heads_and_embeddings_are_part_of_a_checkpoint(tmp_path):
    model = get_peft_model(
        models.tiny("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    )
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.fill_(0.25)
    model.save_pretrained(tmp_path)
    again = load_adapter(models.tiny("bert"), tmp_path, accelerate=False)
    assert bool((again.base_model.model.classifier.modules_to_save["default"].weight == 0.25).all())

    shutil.rmtree(tmp_path)
    model = get_peft_model(
        models.tiny("llama"), LoraConfig(target_modules=["q_proj", "embed_tokens"])
    )
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) > 6
    assert (
        check(
            load_adapter(models.tiny("llama"), tmp_path, is_trainable=True, accelerate=False)
        ).tensors
        == 6
    )


_METHODS = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "dora": LoraConfig(target_modules=["q_proj"], use_dora=True),
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "loha": LoHaConfig(target_modules=["q_proj"]),
    "lokr": LoKrConfig(target_modules=["q_proj"]),
    "vera": VeraConfig(target_modules=["q_proj"], r=4),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=8, use_cayley_neumann=False),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_other_methods_pass_and_load(method, tmp_path):
    model = get_peft_model(models.tiny("llama"), copy.deepcopy(_METHODS[method]))
    batch = models.batch("llama")
    batch["input_ids"][0, :2] = torch.tensor([3, 4])
    report = check(model, batch)
    assert report.trainable == sum(p.requires_grad for p in model.parameters())
    assert report.notes == ()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(models.tiny("llama"), tmp_path, accelerate=False)
    assert torch.equal(loaded(**batch).loss, model.eval()(**batch).loss)


def test_names_that_need_no_change_are_not_renamed(tmp_path):
    """PEFT's rules for older checkpoints turn ``shared_experts`` of Laguna into a name that the model does not have."""
    model = wrap(tiny_model("laguna"), LoraConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny_model("laguna"), tmp_path)
    saved, loaded = (dict(one.named_parameters()) for one in (model, again))
    names = [name for name in saved if ".lora_" in name]
    assert any("shared_experts" in name for name in names)
    for name in names:
        assert torch.equal(saved[name], loaded[name]), name
