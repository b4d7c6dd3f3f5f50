"""``Float8Linear``: its tensors survive conversions, copies and files; ``to_fp8`` and ``from_fp8`` change only what they should."""

import copy
import io
import json

import models
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from peftkit import ContractError, Float8Linear, LoraConfig, from_fp8, to_fp8, wrap
from peftkit_kernels.storage.fp8 import dequantize_fp8, quantize_fp8

IDS = torch.arange(24).view(2, 12) % 60


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(40, 24, bias=bias, dtype=dtype)


def codes(layer):
    return layer.weight.detach().view(torch.uint8)


def assert_same_weight(layer, other):
    assert torch.equal(codes(layer), codes(other))
    assert torch.equal(layer.weight_scale, other.weight_scale)


# one layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_is_near_the_one_it_was_made_from(dtype, bias):
    plain = linear(dtype, bias)
    layer = Float8Linear.from_linear(plain.eval())
    assert (layer.compute_dtype, layer.training, layer.bias) == (dtype, False, plain.bias)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.dequantize(), dequantize_fp8(quantize_fp8(plain.weight), dtype))
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, found = plain(x), layer(x)
    assert found.dtype is dtype
    # weight and input are each off by 2.6 % on average
    assert 0.005 < (found - expected).norm() / expected.norm() < 0.05


def test_the_gradients_of_input_and_bias():
    plain = linear()
    layer = Float8Linear.from_linear(plain)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    dx, dbias = torch.autograd.grad(layer(x), [x, layer.bias], dy)
    torch.testing.assert_close(dbias, dy.sum(0))
    exact = dy @ layer.dequantize()
    assert 0.01 < (dx - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
    ids=["to", "bfloat16", "device", "parent"],
)
def test_a_change_of_dtype_changes_neither_codes_nor_scale(convert):
    layer = Float8Linear.from_linear(linear())
    before = copy.deepcopy(layer)
    layer = convert(layer)
    assert_same_weight(layer, before)
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert layer.weight_scale.dtype is torch.float32
    assert layer.bias.dtype is layer.compute_dtype is torch.bfloat16
    assert layer(torch.ones(2, 40, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_copies_and_files_of_torch():
    layer = Float8Linear.from_linear(linear(torch.bfloat16))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = Float8Linear(40, 24, dtype=torch.bfloat16)
    loaded.load_state_dict(torch.load(file))
    assigned = Float8Linear(40, 24, device="meta", dtype=torch.bfloat16)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    # torch's own pickle of a float8 tensor outside torch.save cannot be read
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    saved = torch.load(whole, weights_only=False)
    for other in (copy.deepcopy(layer), saved, loaded, assigned):
        assert_same_weight(layer, other)
        assert other.compute_dtype is torch.bfloat16
        assert not other.weight.requires_grad


def test_the_device_meta():
    layer = Float8Linear(40, 24, device="meta")
    assert layer.weight.is_meta
    assert layer.weight_scale.is_meta
    layer = layer.to_empty(device="cpu")
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert Float8Linear.from_linear(linear()).to("meta").weight_scale.is_meta


def test_scales_of_other_libraries():
    layer, other = Float8Linear.from_linear(linear()), Float8Linear(40, 24)
    state = layer.state_dict() | {"weight_scale": layer.weight_scale.bfloat16().view(-1)}
    other.load_state_dict(state)
    assert torch.equal(other.weight_scale, layer.weight_scale.bfloat16().float())
    assert state["weight_scale"].shape == (24,)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
def test_another_kind_of_weight_is_refused(strict, assign):
    layer = Float8Linear.from_linear(linear())
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, but the layer stores float8"):
        layer.load_state_dict(linear().state_dict(), strict=strict, assign=assign)
    assert_same_weight(layer, before)
    state = layer.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match="weight is given without weight_scale"):
        layer.load_state_dict(state, strict=strict, assign=assign)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(4, 4), "the layer is a Embedding; only a plain nn.Linear"),
        (lambda: Float8Linear.from_linear(linear()), "the layer is a Float8Linear; only"),
        (lambda: nn.Linear(4, 4, device="meta"), "the weight is on the device meta"),
    ],
)
def test_layers_that_cannot_be_stored(make, message):
    with pytest.raises(ContractError, match=message):
        Float8Linear.from_linear(make())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad):
    plain = linear()
    plain.weight.data[3, 4] = bad
    plain.weight.data[7, :2] = bad
    with pytest.raises(ContractError, match="2 of 24 rows of the weight have values that are NaN"):
        Float8Linear.from_linear(plain)


def test_codes_are_not_copied_and_are_checked():
    q = quantize_fp8(linear().weight)
    layer = Float8Linear.from_codes(q.codes, q.row_scale, None, torch.bfloat16)
    assert layer.weight.data_ptr() == q.codes.data_ptr()
    assert layer.weight_scale.shape == (24, 1)
    with pytest.raises(ValueError, match=r"row_scale is torch.float32 \(23,\)"):
        Float8Linear.from_codes(q.codes, q.row_scale[1:], None, torch.bfloat16)


# a model


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5", "phi3"])
def test_the_linear_layers_of_a_model(name):
    model = models.tiny(name)
    before = {n: type(m) for n, m in model.named_modules()}
    stored_bytes = sum(p.nbytes for p in model.parameters())
    assert to_fp8(model) is model
    changed = {n for n, m in model.named_modules() if type(m) is not before[n]}
    assert changed
    assert all(
        before[n] is nn.Linear and type(model.get_submodule(n)) is Float8Linear for n in changed
    )
    assert {n for n, kind in before.items() if kind is nn.Linear} - changed == set(
        model.config.quantization_config["ignore"]
    )
    assert not any(n.split(".")[0] in ("lm_head", "cls", "classifier", "score") for n in changed)
    assert sum(p.nbytes for p in model.parameters()) < stored_bytes


def test_what_is_kept():
    model = to_fp8(
        models.tiny("llama"), keep=["layers.0.mlp", "v_proj", "model.layers.1.self_attn.q_proj"]
    )
    kept = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert kept == {
        *(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")),
        *(f"model.layers.{i}.self_attn.v_proj" for i in range(2)),
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    }
    assert set(model.config.quantization_config["ignore"]) == kept


def test_what_transformers_keeps_in_float32():
    model = to_fp8(models.tiny("t5"))
    kinds = {n: type(m) for n, m in model.named_modules()}
    assert {kind for n, kind in kinds.items() if n.endswith(".wo")} == {nn.Linear}
    assert {kind for n, kind in kinds.items() if n.endswith((".wi", ".q", ".o"))} == {Float8Linear}


def test_shared_weights_and_layers_are_kept():
    model = models.tiny("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.o_proj = first.self_attn.o_proj
    to_fp8(model)
    shared = (first.mlp.up_proj, second.mlp.up_proj, first.self_attn.o_proj)
    assert [type(m) for m in shared] == [nn.Linear] * 3
    assert second.self_attn.o_proj is first.self_attn.o_proj
    assert type(first.mlp.down_proj) is Float8Linear


@pytest.mark.parametrize(
    ("make", "keep", "message"),
    [
        (
            lambda: wrap(models.tiny("llama"), LoraConfig(r=4)),
            (),
            "has adapters; call to_fp8 before",
        ),
        (lambda: to_fp8(models.tiny("llama")), (), "is quantised already"),
        (
            lambda: models.tiny("llama"),
            ["q_prj"],
            r"'q_prj', which matches no module; did you mean",
        ),
        (lambda: models.tiny("llama"), "q_proj", "keep='q_proj' is a string; pass a list"),
        (lambda: models.tiny("llama"), ["model"], "keep or shared weights exclude"),
        (lambda: models.tiny("gpt2"), (), "its backbone has no nn.Linear"),
    ],
)
def test_models_that_cannot_be_stored(make, keep, message):
    with pytest.raises(ContractError, match=message):
        to_fp8(make(), keep)


def test_nothing_is_replaced_if_one_weight_is_not_finite():
    model = models.tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ContractError, match=rf"^{name}: 1 of .* with keep=\['{name}'\]"):
        to_fp8(model)
    assert not any(isinstance(m, Float8Linear) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")
    assert type(to_fp8(model, [name]).get_submodule(name)) is nn.Linear


def test_decoding_a_model():
    model = to_fp8(models.tiny("llama", dtype=torch.bfloat16))
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.dequantize()
    assert from_fp8(model) is model
    plain = model.model.layers[0].mlp.up_proj
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, weight)
    assert not plain.weight.requires_grad
    assert not hasattr(model.config, "quantization_config")
    wide = from_fp8(to_fp8(models.tiny("bert", dtype=torch.bfloat16)), torch.float32)
    layer = wide.bert.encoder.layer[0].output.dense
    assert layer.weight.dtype is layer.bias.dtype is torch.float32
    with pytest.raises(ContractError, match="has no float8 layer"):
        from_fp8(model)


def test_a_checkpoint_has_the_layout_of_compressed_tensors(tmp_path):
    model = to_fp8(models.tiny("llama", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    assert weight.dtype is torch.float8_e4m3fn
    assert (scale.dtype, scale.shape) == (torch.float32, (weight.shape[0], 1))
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == (
        "compressed-tensors",
        "float-quantized",
    )
    assert settings["ignore"] == ["lm_head"]
    # an empty model of the same config, with the layers of the file
    again = to_fp8(hf.LlamaForCausalLM(model.config.__class__(**models._DECODER)).bfloat16())
    missing, unexpected = again.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            assert_same_weight(module, again.get_submodule(name))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_transformers_does_not_read_codes_as_weights(tmp_path):
    """Without compressed-tensors it refuses the checkpoint."""
    to_fp8(models.tiny("llama")).save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="compressed"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
