"""Bottleneck adapters on plain models: the formula of every placement in float64, identity at the start, nothing else touched."""

import copy
import pickle

import families
import models
import oracles
import pytest
import speech_cases
import torch
import torch.nn.functional as F
from torch import nn

from peftkit.bottleneck import (
    Bottleneck,
    BottleneckConfig,
    BottleneckSite,
    add_bottlenecks,
    remove_bottlenecks,
)
from peftkit.find.points import probe_inputs

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def randomised(model: nn.Module) -> nn.Module:
    """Adapters that do something: every parameter of theirs drawn anew."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            for parameter in module.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return next(
        result[k] for k in ("logits", "logits_per_text", "last_hidden_state") if k in result
    )


def part(adapter: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds, from its weights alone."""
    w = {name: p.detach() for name, p in adapter.named_parameters()}
    hidden = (x @ w["down.weight"].T + w["down.bias"]).clamp(min=0)
    return 4.0 * (hidden @ w["up.weight"].T + w["up.bias"])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", families.NAMES)
def test_a_new_adapter_changes_no_bit_and_a_trained_one_does(name, placement):
    model = families.family(name)
    inputs = probe_inputs(model)
    expected, keys = outputs(model, inputs), set(model.state_dict())
    config = BottleneckConfig(bottleneck_size=4, placement=placement)
    adapted = add_bottlenecks(model, config)
    assert len(adapted) == len(set(adapted)) >= 2
    actual = outputs(model, inputs)
    # LN(s + 0) is computed a second time, by the same operations
    assert torch.equal(actual, expected)
    added = {key for key in model.state_dict() if key not in keys}
    assert keys <= set(model.state_dict())
    assert added
    assert all(".bottleneck.adapters.default." in key for key in added)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added
    assert not torch.equal(outputs(randomised(model), inputs), expected)
    assert len(remove_bottlenecks(model)) == len(adapted)
    assert set(model.state_dict()) == keys
    assert torch.equal(outputs(model, inputs), expected)


def double(name: str, placement: str) -> nn.Module:
    model = families.family(name).double()
    config = BottleneckConfig(bottleneck_size=4, placement=placement, scaling=4.0, layers=[1])
    add_bottlenecks(model, config)
    return randomised(model)


def layer_call(layer: nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Record a layer's input and output, and the inputs and outputs of all its modules."""
    seen: dict[str, torch.Tensor] = {}

    def record(name: str):
        def hook(module, args, output):
            seen[f"{name}<"] = args[0] if args else None
            seen[f"{name}>"] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in layer.named_modules():
        module.register_forward_hook(record(name))
    return seen


def test_houlsby_and_parallel_in_a_pre_norm_decoder():
    """Llama's second layer, written out from its sub-modules: ``r + h + A(h)`` and ``r + h + A(x)``."""
    ids = {"input_ids": torch.arange(10)[None]}
    for placement in ("houlsby", "parallel"):
        model = double("llama", placement)
        layer = model.model.layers[1]
        plain = copy.deepcopy(layer)
        seen = layer_call(layer)
        outputs(model, ids)
        x = seen["<"]
        attended = seen["self_attn>"]
        if placement == "houlsby":
            attended = plain.self_attn.o_proj.forward(seen["self_attn.o_proj<"])
            attended = attended + part(
                layer.self_attn.o_proj.bottleneck.adapters["default"], attended
            )
        r = x + attended
        z = plain.post_attention_layernorm(r)
        h = plain.mlp.forward(z)
        read = h if placement == "houlsby" else z
        expected = r + h + part(layer.mlp.bottleneck.adapters["default"], read)
        oracles.assert_equals(seen[">"], expected)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_parallel_between_two_linears(name):
    """BERT and OPT have no module around their MLP: the input is that of its first linear."""
    model = double(name, "parallel")
    layers = model.bert.encoder.layer if name == "bert" else model.model.decoder.layers
    first, last = ("intermediate.dense", "output.dense") if name == "bert" else ("fc1", "fc2")
    plain = copy.deepcopy(layers[1].get_submodule(last))
    seen = layer_call(layers[1])
    outputs(model, {"input_ids": torch.arange(3, 12)[None]})
    site = layers[1].get_submodule(last).bottleneck
    h = plain.forward(seen[f"{last}<"])
    expected = h + part(site.adapters["default"], seen[f"{first}<"])
    oracles.assert_equals(seen[f"{last}>"], expected)
    assert site.carry.value is None  # nothing outlives the forward


def test_pfeiffer_in_a_post_norm_encoder():
    """BERT's last norm: ``LN(h + A(LN(h + res)) + res)``."""
    model = double("bert", "pfeiffer")
    output = model.bert.encoder.layer[1].output
    seen = layer_call(output)
    outputs(model, {"input_ids": torch.arange(3, 12)[None]})
    norm = output.LayerNorm
    s = seen["LayerNorm<"]

    def ln(v):
        return F.layer_norm(v, (32,), norm.weight, norm.bias, norm.eps)

    expected = ln(s + part(norm.bottleneck.adapters["default"], ln(s)))
    oracles.assert_equals(seen[">"], expected)


def test_pfeiffer_in_a_pre_norm_decoder():
    """Llama's second layer: ``z + A(z)`` on the layer's output."""
    model = double("llama", "pfeiffer")
    layer = model.model.layers[1]
    plain = copy.deepcopy(layer)
    seen = layer_call(layer)
    outputs(model, {"input_ids": torch.arange(10)[None]})
    r = seen["<"] + seen["self_attn>"]
    z = r + plain.mlp(plain.post_attention_layernorm(r))
    expected = z + part(layer.bottleneck.adapters["default"], z)
    oracles.assert_equals(seen[">"], expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "bert", "qwen3_moe", "t5"])
def test_float32_against_the_formula_in_float64(name, placement):
    """Each adapted module's output from what the adapter was given; where that is, the tests above say."""
    model = families.family(name)
    add_bottlenecks(model, BottleneckConfig(bottleneck_size=4, placement=placement, scaling=4.0))
    calls = []
    for module in randomised(model).modules():
        if isinstance(module, BottleneckSite):
            module.register_forward_hook(lambda *call: calls.append(call))
    outputs(model, probe_inputs(model))
    assert len(calls) >= 2
    for site, (base, read, x), actual in calls:
        given = x if placement == "parallel" else base if read is None else read
        adapter = copy.deepcopy(site.adapters["default"]).double()
        assert actual.dtype is torch.float32
        oracles.assert_equals(actual, base.double() + part(adapter, given.double()))


def test_learned_scaling_layer_norm_and_activation():
    adapter = Bottleneck(6, 3, "gelu", "learned", layer_norm=True, dtype=torch.float64)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    base, x = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    n, d, u = adapter.norm, adapter.down, adapter.up
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + n.eps).sqrt()
    z = z * n.weight + n.bias
    a = z @ d.weight.T + d.bias
    a = a * 0.5 * (1 + torch.erf(a / 2**0.5))
    expected = base + adapter.scaling * (a @ u.weight.T + u.bias)
    oracles.assert_equals(adapter(base, x), expected)
    assert torch.autograd.gradcheck(adapter, (base.requires_grad_(), x.requires_grad_()))
    assert "scaling=learned" in repr(adapter)


def test_sizes_layers_and_explicit_targets():
    model = models.tiny("llama")
    config = BottleneckConfig(reduction_factor=8, layers=[1], layer_norm=True)
    assert add_bottlenecks(model, config) == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp",
    ]
    assert model.model.layers[1].mlp.bottleneck.adapters["default"].down.out_features == 4
    assert not hasattr(model.model.layers[0].mlp, "bottleneck")
    model = models.tiny("llama")
    names = ["model.layers.0.mlp.down_proj"]
    assert add_bottlenecks(model, BottleneckConfig(target_modules=names)) == names
    assert model.model.layers[0].mlp.down_proj.bottleneck.adapters["default"].down.out_features == 2


def test_half_precision_base_keeps_its_dtype():
    model = models.tiny("llama", dtype=torch.bfloat16).eval()
    add_bottlenecks(model, BottleneckConfig(bottleneck_size=4))
    for module in model.modules():
        if isinstance(module, BottleneckSite):
            module.float()
    ids = {"input_ids": torch.arange(10)[None]}
    assert outputs(randomised(model), ids).dtype is torch.bfloat16


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_copy_has_adapters_of_its_own(name, copier):
    model = families.family(name)
    add_bottlenecks(model, BottleneckConfig(bottleneck_size=4, placement="parallel"))
    inputs = probe_inputs(model)
    expected = outputs(randomised(model), inputs)
    twin = copier(model)
    remove_bottlenecks(model)
    assert torch.equal(outputs(twin, inputs), expected)
    assert not torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant, placement):
    gradients = []
    for checkpointing in (False, True):
        model = models.tiny(name)
        add_bottlenecks(model, BottleneckConfig(bottleneck_size=4, placement=placement))
        randomised(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**models.batch(name)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain
    assert all(g is not None and g.any() for g in plain.values())
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "sideways"}, "placement='sideways' is unknown; use 'houlsby'"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "both set the size"),
        ({"activation": "elu"}, "activation='elu' is unknown; use one of relu"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 is below 1"),
        ({"reduction_factor": 0}, "reduction_factor=0 is not above 0"),
        ({"scaling": "big"}, "scaling='big': use a number or 'learned'"),
        ({"layers": [0, 2]}, "the model has no layer 2; it has the layers 0 to 1"),
        ({"target_modules": ["mlp"]}, "'mlp' is not a module of LlamaForCausalLM"),
    ],
)
def test_errors_name_the_argument_and_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        add_bottlenecks(models.tiny("llama"), BottleneckConfig(**fields))


def test_a_model_without_attention_is_refused_by_name():
    import transformers as hf

    config = hf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    model = hf.ResNetModel(config)
    inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    with pytest.raises(ValueError, match="no layer of ResNetModel calls an attention"):
        add_bottlenecks(model, BottleneckConfig(), example=inputs)


def test_the_places_in_a_model_whose_decoder_reads_spectrograms():
    names = add_bottlenecks(speech_cases.tiny_speecht5(), BottleneckConfig())
    assert any("decoder" in name for name in names)
    assert any("encoder" in name for name in names)
