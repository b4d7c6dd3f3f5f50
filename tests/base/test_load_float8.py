"""``load_base(..., "fp8")`` quantises while it reads, and gives the model that ``to_fp8`` makes of the unquantised one."""

import base_cases
import models
import pytest
import torch

import peftkit
from peftkit import ContractError, Float8Linear, base_report, load_base, to_fp8

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(tmp_path):
    return base_cases.save_llama(tmp_path)


def assert_same_layers(model, expected):
    base_cases.assert_same(model, expected)
    assert vars(model).keys() == vars(expected).keys()
    assert not model.training
    others = dict(expected.named_modules())
    for name, module in model.named_modules():
        assert type(module) is type(others[name]), name
        assert module.training is others[name].training
        if isinstance(module, Float8Linear):
            assert module.compute_dtype is others[name].compute_dtype
            assert module.weight.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "phi3", "t5", "vit"])
def test_architectures_equal_those_of_to_fp8(tmp_path, name, dtype):
    models.tiny(name, dtype=dtype).save_pretrained(tmp_path, max_shard_size="20KB")

    model = load_base(tmp_path, "fp8")

    assert_same_layers(model, to_fp8(load_base(tmp_path)))
    assert "fp8" in {part.storage for part in base_report(model).parts}


def test_a_dtype_and_layers_to_keep(saved):
    model = load_base(saved, "fp8", keep=["down_proj", "layers.0"], dtype="float16")

    expected = to_fp8(load_base(saved, "fp16"), ["down_proj", "layers.0"])
    assert_same_layers(model, expected)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is Float8Linear


def test_a_model_in_memory_is_changed_in_place(saved):
    model = load_base(saved)

    assert load_base(model, "fp8", keep=["q_proj"], dtype="float16") is model

    base_cases.assert_same(model, to_fp8(load_base(saved, "fp16"), ["q_proj"]))
    with pytest.raises(ContractError, match="already quantised"):
        load_base(model, "fp8")


def test_it_is_wrapped_and_trained_like_a_model_of_to_fp8(saved):
    ids = torch.arange(24).view(2, 12) % 90
    losses = []
    for model in (load_base(saved, "fp8"), to_fp8(load_base(saved))):
        torch.manual_seed(1)
        model = peftkit.wrap(model, peftkit.LoraConfig(r=4, init_lora_weights=False)).train()
        assert peftkit.explain(model).fused_fraction == 1
        losses.append(model(input_ids=ids, labels=ids).loss.detach())
    assert torch.equal(*losses)


@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_not_finite(saved, strict):
    def spoil(weight):
        weight[3, 5] = torch.nan
        return weight

    base_cases.edit_shard(saved, TENSOR, spoil)

    with pytest.raises(ContractError, match=r"up_proj.* has 1 value that is NaN or infinite"):
        load_base(saved, "fp8", strict=strict)
    if not strict:
        model = load_base(saved, "fp8", keep=["layers.1.mlp.up_proj"], strict=False)
        assert model.model.layers[1].mlp.up_proj.weight.isnan().sum() == 1


@pytest.mark.parametrize("base", ["nf4", "fp8"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("own", ["weight", "bias"])
def test_what_a_quantised_layer_misses_is_an_error(tmp_path, base, strict, own):
    name = f"model.layers.1.mlp.up_proj.{own}"
    base_cases.save_llama(tmp_path, mlp_bias=True)
    base_cases.edit_shard(tmp_path, name, lambda _: None)
    index = tmp_path / "model.safetensors.index.json"
    base_cases.edit_json(index, lambda data: data["weight_map"].pop(name))

    with pytest.raises(ContractError, match=name) as error:
        load_base(tmp_path, base, strict=strict)
    assert "weight_scale" not in str(error.value)


def test_a_config_of_another_checkpoint(saved):
    base_cases.edit_json(saved / "config.json", lambda data: data.update(intermediate_size=192))

    with pytest.raises(ContractError, match=r"mlp.* has the shape .* in the checkpoint"):
        load_base(saved, "fp8")


def test_entries_of_keep_that_match_nothing(saved):
    with pytest.raises(ContractError, match="'up_projection', which matches no module"):
        load_base(saved, "fp8", keep=["up_projection"])
    with pytest.raises(ContractError, match="is one string; pass a list"):
        load_base(saved, "fp8", keep="up_proj")
