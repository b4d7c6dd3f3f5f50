"""LoRA on convolutions, embeddings and tied weights: PEFT's layers run, and wrap, explain, save and merge work with them."""

import copy
import math
import pickle

import families
import models
import pairs
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Conv2d
from torch import nn

from peftkit import ContractError, check, explain, load_adapter, restore, wrap
from peftkit.find.points import probe_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def resnet():
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return hf.ResNetForImageClassification(config)


def efficientnet():
    config = hf.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.1,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 6],
        depthwise_padding=[],
        hidden_dim=320,
        num_labels=3,
    )
    return hf.EfficientNetForImageClassification(config)


def conv3d():
    """A model on patches of videos."""
    return nn.Sequential(nn.Conv3d(3, 8, 2, stride=2), nn.Flatten(1), nn.Linear(8 * 8, 3))


def seeded(build):
    """The model in float64, in which results that agree to 1e-10 come from the same computation."""
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def waves(*shape):
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape).sin()


IMAGES = {"pixel_values": waves(2, 3, 32, 32)}
CASES = {
    "resnet": (resnet, IMAGES, ["convolution"], "lora.Conv2d"),
    "efficientnet": (
        efficientnet,
        IMAGES,
        ["expand_conv", "project_conv", "squeeze_excite.reduce"],
        "lora.Conv2d",
    ),
    "vit": (lambda: models.tiny("vit"), None, ["projection", "q_proj"], "lora.Conv2d"),
    "whisper": (lambda: families.family("whisper"), None, ["conv1", "conv2", "fc1"], "lora.Conv1d"),
    "wav2vec2": (
        lambda: families.family("wav2vec2"),
        None,
        ["feature_extractor.conv_layers.1.conv", "feature_extractor.conv_layers.2.conv"],
        "lora.Conv1d",
    ),
    "embeddings": (
        lambda: models.tiny("llama"),
        None,
        ["embed_tokens", "v_proj"],
        "lora.Embedding",
    ),
    "positions": (
        lambda: models.tiny("bert"),
        None,
        ["word_embeddings", "position_embeddings"],
        "lora.Embedding",
    ),
    "video": (
        conv3d,
        (waves(2, 3, 4, 4, 4),),
        ["0"],
        "lora.Conv3d",
    ),
}


def build(name):
    make, inputs, targets, kind = CASES[name]
    model = seeded(make)
    inputs = probe_inputs(model) if inputs is None else inputs
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    return model, inputs, config, kind


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def is_close(a, b):
    torch.testing.assert_close(a, b, **ROUNDING)


def filled(model):
    pairs.fill_factors(model)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_wrapped_explained_saved_merged_and_unloaded(name, tmp_path):
    base, inputs, config, kind = build(name)
    expected = output(base, inputs)
    model = wrap(copy.deepcopy(base), config)
    is_close(output(model.eval(), inputs), expected)
    reports = [r for r in explain(model).layers if r.is_adapter]
    unfused = {r.reason for r in reports if r.path == "peft"}
    assert f"{kind} layers have no fused forward" in unfused
    assert len(unfused) == 1
    adapted = output(filled(model), inputs)
    assert not torch.allclose(adapted, expected, **ROUNDING)
    with model.disable_adapter():
        is_close(output(model, inputs), expected)
    # PEFT also saves the whole embedding that is targeted; the file must fit the base without it
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    is_close(output(again.eval(), inputs), adapted)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    if name == "whisper":
        # Whisper's encoder reads the stride of the convolution, which PEFT's layer does not have
        with pytest.raises(AttributeError, match="no attribute 'stride'"):
            output(again, inputs)
    else:
        is_close(output(again, inputs), adapted)
    merged = restore(model.merge_and_unload())
    is_close(output(merged.eval(), inputs), adapted)
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }


@pytest.mark.parametrize("name", ["resnet", "vit", "embeddings", "positions"])
def test_check_finds_a_gradient_for_every_factor(name):
    base, _, config, _ = build(name)
    model = filled(wrap(base, config)).train()
    labels = {"labels": torch.tensor([0, 2])}
    batch = {"resnet": IMAGES | labels}.get(name) or models.batch(
        {"embeddings": "llama", "positions": "bert"}.get(name, name)
    )
    report = check(model, batch)
    factors = [n for n, p in model.named_parameters() if p.requires_grad]
    assert factors
    assert all(report.grad_norms[n] > 0 for n in factors)


def grouped():
    """A depthwise convolution between two plain ones."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))


def test_a_rank_that_does_not_fit_the_groups_is_an_error_with_fixes():
    with pytest.raises(
        ContractError,
        match=r"1 is a Conv2d of 8 groups, and its rank is 12: .*Pass r=16 or rank_pattern=\{'1': 8\}",
    ):
        wrap(grouped(), LoraConfig(r=12, target_modules=["0", "1", "2"]))
    for ways_out in ({"r": 16}, {"r": 12, "rank_pattern": {"1": 8}}):
        config = LoraConfig(target_modules=["0", "1", "2"], **ways_out)
        with pytest.warns(UserWarning, match="Merging is not supported"):
            model = wrap(grouped(), config)
        assert model(torch.ones(1, 3, 5, 5)).requires_grad


def test_a_depthwise_convolution_trains_but_is_not_merged():
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = wrap(grouped(), LoraConfig(r=8, target_modules=["1"]))
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()


def test_sizes_of_the_convolution_are_readable_and_copies_work():
    model = wrap(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.stride, twin.kernel_size, twin.groups) == ((2, 2), (3, 3), 1)
        assert isinstance(twin, Conv2d)
        assert type(twin).__name__ == "Conv2d"
        assert torch.equal(twin(torch.ones(1, 3, 5, 5)), layer(torch.ones(1, 3, 5, 5)))
    with pytest.raises(AttributeError, match="no attribute 'strides'"):
        _ = layer.strides
    restore(model)
    assert type(layer) is Conv2d


def test_efficientnets_depthwise_convolutions_are_named():
    with pytest.raises(ContractError, match=r"depthwise_conv is a \w*Conv2d of \d+ groups"):
        wrap(seeded(efficientnet), LoraConfig(r=4, target_modules=["depthwise_conv"]))


def tied():
    """A Llama whose head and embedding are tied."""
    settings = models.tiny("llama").config.to_dict() | {"tie_word_embeddings": True}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_one_of_two_tied_weights_is_an_error_with_fixes(config):
    base = tied()
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(
        ContractError, match=r"shares its weight with (.|\n)*ensure_weight_tying=True(.|\n)*untie"
    ):
        wrap(base, LoraConfig(**config))
    assert {n: type(m) for n, m in base.named_modules()} == before


def test_ties_are_found_by_storage():
    """Some loaders leave two parameters that share memory."""
    model = models.tiny("llama")
    shared = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(shared.detach())
    assert model.lm_head.weight is not shared
    with pytest.raises(ContractError, match=r"lm_head shares its weight with model\.embed_tokens"):
        wrap(model, LoraConfig(target_modules=["lm_head"]))


def test_the_first_fix_keeps_them_tied(tmp_path):
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = filled(wrap(tied(), config))
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "Embedding"}
    assert layers
    head = model.get_submodule("base_model.model.lm_head")
    embedding = model.get_submodule("base_model.model.model.embed_tokens")
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    assert head.lora_A["default"].weight.data_ptr() == B.data_ptr()
    assert head.lora_B["default"].weight.data_ptr() == A.data_ptr()
    assert model(**models.batch("llama")).loss.requires_grad


def test_the_second_fix_unties_them():
    model = tied()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    wrapped = wrap(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert wrapped(**models.batch("llama")).loss.requires_grad


def test_tied_weights_without_an_adapter_are_no_error():
    model = wrap(tied())
    assert explain(model).fused_fraction == 1.0
    base = model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
