"""Initialisations that change the base weight or use data, with ``wrap``: PEFT's numbers, files and conversions."""

import copy

import models
import pairs
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft import initialize_lora_eva_weights as initialize
from safetensors.torch import load_file
from torch import nn

from peftkit import explain, load_adapter, wrap
from peftkit.find.targets import all_linear

pytestmark = pytest.mark.usefixtures("one_thread")

INITS = ("pissa", "pissa_niter_4", "olora", "orthogonal")


def configured(init, **changes):
    names = all_linear(models.tiny("llama")).names
    return LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=init, **changes)


def both(init, **changes):
    """The same adapter added by PEFT and by ``wrap``, from the same random state."""
    made = []
    for put_on in (get_peft_model, wrap):
        torch.manual_seed(0)
        made.append(put_on(models.tiny("llama"), configured(init, **changes)))
    return made


def logits(model):
    with torch.no_grad():
        return model.eval()(**models.batch("llama")).logits


def trained(model, steps=3):
    """Run a few steps of SGD on both models."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for seed in range(steps):
        pairs.loss_from_logits(model, models.batch("llama", seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}


def updated(model):
    """For every linear by its name in the base model: ``W + scale · B A`` in float64, and the magnitudes."""
    weights = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear) or name.endswith(".base_layer") or "lora_" in name:
            continue
        W = base.weight.detach().double()
        sizes = W.abs()
        if base is not module:
            A, B = (p["default"].weight.detach().double() for p in (module.lora_A, module.lora_B))
            scale = module.scaling["default"]
            W, sizes = W + scale * B @ A, sizes + abs(scale) * B.abs() @ A.abs()
        weights[name.removeprefix("base_model.model.")] = W, sizes
    return weights


def assert_same_weights(model, expected):
    """Assert equality up to the rounding of one float32 sum of up to eight products and the weight."""
    actual = updated(model)
    assert actual.keys() == expected.keys()
    for name, (W, sizes) in actual.items():
        bound = 12 * 2.0**-24 * (sizes + expected[name][1])
        assert ((W - expected[name][0]).abs() <= bound).all(), name


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_the_start_equals_pefts_and_all_layers_are_fused(init, rslora):
    plain, fused = both(init, use_rslora=rslora)
    pairs.assert_equal(fused.state_dict(), plain.state_dict())
    assert explain(fused).fused_fraction == 1.0
    truth = pairs.in_float64(plain)
    runs = []
    for seed in range(3):
        batch = models.batch("llama", seed)
        runs.append(
            tuple(pairs.step(m, batch, pairs.loss_from_logits) for m in (fused, plain, truth))
        )
    pairs.assert_near_enough(runs)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_is_changed_so_that_the_start_equals_the_base_model(init):
    base = models.tiny("llama")
    expected, weights = updated(base), copy.deepcopy(base.state_dict())
    model = wrap(base, configured(init))
    assert_same_weights(model, expected)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    assert not torch.allclose(layer.base_layer.weight, weights[f"{name}.weight"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights of the model")
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_a_trained_adapter_is_converted_to_plain_lora(init, rslora, tmp_path):
    """PEFT subtracts the initial adapter, which is saved before training, so that the file of rank 2r fits the unchanged base."""
    model = wrap(models.tiny("llama"), configured(init, use_rslora=rslora))
    model.peft_config["default"].init_lora_weights = True  # as in PEFT's documentation
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    expected = updated(trained(model))
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    held = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in held.items() if "lora_A" in name} == {8}
    for load in (PeftModel.from_pretrained, load_adapter):
        assert_same_weights(load(models.tiny("llama"), tmp_path / "converted"), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merging_gives_the_trained_model(init):
    model = trained(wrap(models.tiny("llama"), configured(init)))
    expected = updated(model)
    assert_same_weights(model.merge_and_unload(), expected)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_initialises_from_data():
    """In float64, so that the inputs of both models differ too little to change a direction."""
    made = []
    data = [
        {k: v for k, v in models.batch("llama", seed).items() if k != "labels"} for seed in range(4)
    ]
    for put_on in (get_peft_model, wrap):
        config = configured("eva", eva_config=EvaConfig(rho=1.0))
        model = put_on(models.tiny("llama", dtype=torch.float64), config)
        before = factors(model)
        torch.manual_seed(0)
        initialize(model, data, show_progress_bar=False)
        made.append(model)
        assert not any(torch.equal(value, before[n]) for n, value in factors(model).items())
    plain, fused = made
    assert explain(fused).fused_fraction == 1.0
    pairs.assert_close(factors(fused), factors(plain), 1e-8)
    start = logits(models.tiny("llama", dtype=torch.float64))
    torch.testing.assert_close(logits(fused), start, rtol=1e-10, atol=1e-10)
    trained(fused)
    assert not torch.allclose(logits(fused), start, rtol=1e-10, atol=1e-10)
