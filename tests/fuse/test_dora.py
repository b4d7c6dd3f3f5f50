"""DoRA on fused layers gives PEFT's numbers in every state of a layer, without PEFT's dense products."""

import copy
from collections import Counter

import models
import pairs
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from lab.interp import faithful
from lab.testing import Made, assert_no_worse_than
from lab.traffic import Traffic
from peftkit import accelerate, explain, wrap
from peftkit.fuse.compute import LinearParts, gated_mlp
from peftkit.fuse.linear import FusedLinear
from peftkit_kernels.low_rank import LoRA

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {"lora_qkv": 4, "lora_linear": 4, "dora_scale": 10, "dora_gate": 2}
"""Calls in one forward of two layers: one for q/k/v, one for gate/up, one each for o and down; seven magnitudes per layer."""


def pair(name="llama", dtype=torch.float64, **config):
    return pairs.pair(name, dtype, logit_free=False, **{"use_dora": True} | config)


def compare(plain, fused, name="llama", seed=None):
    """One step of both models in float64. With a seed both start from the same random state."""
    batch, loss_of = pairs.inputs(name, torch.float64), None
    if name in models.CAUSAL_NAMES:
        loss_of = pairs.loss_from_logits
    results = []
    for model in (fused, plain):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(pairs.step(model, batch, loss_of))
    pairs.assert_close(*results, 1e-10)
    return results[0]


def counts(monkeypatch, model, name="llama"):
    with pairs.counted(monkeypatch) as calls:
        model(**pairs.inputs(name, torch.float64))
    return {key: value for key, value in calls.items() if "norm" not in key}


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**pairs.inputs(name, torch.float64)).logits


@pytest.mark.parametrize("name", models.NAMES)
def test_a_step_equals_pefts(name, monkeypatch):
    plain, fused = pair(name)
    with pairs.counted(monkeypatch) as calls:
        grads = compare(plain, fused, name)
    assert any("lora_magnitude_vector" in key for key in grads)
    assert calls["dora_scale"] + calls["dora_gate"] > 0
    layers = [m for m in fused.modules() if isinstance(m, FusedLinear)]
    assert calls["peft"] == len(layers), "only the stock model calls it, not the fused one"
    reports = [r for r in explain(fused).layers if r.is_adapter]
    assert {(r.method, r.path, r.reason) for r in reports} == {("DoRA", "fused:torch", "")}


def test_linears_that_share_an_input_are_computed_together(monkeypatch):
    _, fused = pair()
    assert counts(monkeypatch, fused) == LLAMA


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dropout_applies_to_the_same_products_as_in_peft(name, monkeypatch):
    plain, fused = pair(name, lora_dropout=0.3)
    compare(plain, fused, name, seed=3)
    with pairs.counted(monkeypatch) as calls:
        fused(**pairs.inputs(name, torch.float64))
        assert calls["peft"] == 0
        assert calls["lora_swiglu_mlp"] == calls["dora_gate"] == 0
    torch.testing.assert_close(
        logits(fused.eval(), name), logits(plain.eval(), name), rtol=1e-10, atol=1e-10
    )


def test_an_mlp_with_dropout_within_dora_says_that_it_runs_its_own_forward():
    _, fused = pair(lora_dropout=0.3)
    mlps = {(r.path, r.reason) for r in explain(fused).layers if r.method == "gated MLP"}
    assert mlps == {
        (
            "peft",
            "gate_proj: DoRA with dropout cannot be fused across the layers of an MLP; each linear runs separately",
        )
    }
    mlps = {r.path for r in explain(fused.eval()).layers if r.method == "gated MLP"}
    assert mlps == {"fused:torch"}


@pytest.mark.parametrize("targets", [["gate_proj"], ["q_proj", "down_proj"], ["up_proj", "v_proj"]])
def test_only_some_linears_adapted(targets):
    compare(*pair(target_modules=targets))


def test_a_joint_projection_is_split_with_its_magnitude(monkeypatch):
    plain, fused = pair("phi3")
    compare(plain, fused, "phi3")
    assert counts(monkeypatch, fused, "phi3")["dora_gate"] == 2


def test_rank_stabilised_and_patterned_adapters():
    compare(*pair(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"up_proj": 40}))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_to_float64_as_peft(name, dtype):
    plain, fused = pair(name, torch.float32)
    pairs.assert_as_good(plain, fused, name, dtype)


def test_a_bf16_base_with_float32_factors():
    plain, fused = pair("llama", torch.bfloat16)
    assert {p.dtype for p in fused.parameters() if p.requires_grad} == {torch.float32}
    runs = []
    for seed in range(4):
        batch = pairs.inputs("llama", torch.float64, seed)
        exact = pairs.step(pairs.in_float64(plain), batch, pairs.loss_from_logits)
        computed = [pairs.step(m, pairs.inputs("llama", seed=seed)) for m in (fused, plain)]
        runs.append((*computed, exact))
    pairs.assert_near_enough(runs, torch.bfloat16)


def test_state_dict_and_adapter_file_equal_pefts(tmp_path):
    plain, fused = pair()
    pairs.assert_equal(fused.state_dict(), plain.state_dict())
    for model in (plain, fused):
        model.save_pretrained(tmp_path / str(model is fused))
    files = [tmp_path / str(kind) / "adapter_model.safetensors" for kind in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()
    base = models.tiny("llama", dtype=torch.float64)
    again = accelerate(PeftModel.from_pretrained(base, tmp_path / "True"))
    assert torch.equal(logits(again.eval()), logits(fused.eval()))


def test_merging_unmerging_disabling_and_switching():
    plain, fused = pair()
    expected = logits(plain)
    for model in (plain, fused):
        model.merge_adapter()
    assert torch.equal(logits(fused), logits(plain))
    for model in (plain, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(logits(fused), expected, rtol=1e-10, atol=1e-10)
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits(fused), logits(plain))
    for model in (plain, fused):
        model.add_adapter("plain", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("plain")
        pairs.fill_factors(model, seed=5)
    compare(plain, fused)
    for model in (plain, fused):
        model.set_adapter("default")
    compare(plain, fused)
    merged = [model.merge_and_unload() for model in (plain, fused)]
    assert torch.equal(logits(merged[1]), logits(merged[0]))


def changes():
    """Changes of a DoRA layer between two forwards, by name."""

    def base_weight(layer):
        layer.base_layer.weight.data.mul_(1.5)

    def optimiser_step(layer):
        with torch.no_grad():
            layer.lora_B["default"].weight.add_(0.1)

    def magnitude(layer):
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(2.0)

    def replaced(layer):
        new = DoraLinearLayer(layer.fan_in_fan_out)
        new.weight = nn.Parameter(torch.ones(layer.out_features, dtype=torch.float64))
        layer.lora_magnitude_vector["default"] = new

    def hooked(layer):
        layer.lora_magnitude_vector["default"].register_forward_hook(lambda *args: args[-1] * 1.5)

    return {
        "base_weight": base_weight,
        "optimiser_step": optimiser_step,
        "magnitude": magnitude,
        "replaced": replaced,
        "hooked": hooked,
        "scale": lambda layer: layer.set_scale("default", 3.0),
        "merged": lambda layer: layer.merge(),
        "disabled": lambda layer: layer.enable_adapters(False),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("leaf", ["self_attn.k_proj", "mlp.up_proj", "self_attn.o_proj"])
def test_no_state_of_an_earlier_forward_is_used(change, leaf):
    plain, fused = pair()
    before = logits(fused)
    for model in (plain, fused):
        changes()[change](model.get_submodule(f"base_model.model.model.layers.0.{leaf}"))
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-10, atol=1e-10)
    assert torch.allclose(logits(fused), before, rtol=1e-10) == (change == "merged")


def test_a_norm_is_cached_only_under_pefts_dora_caching():
    plain, fused = pair()
    expected = logits(plain)
    caches = [m._dora_cache for m in fused.modules() if isinstance(m, DoraLinearLayer)]
    assert len(caches) == 14
    fused.eval()
    with DoraCaching():
        reasons = {r.reason for r in explain(fused).layers if r.is_adapter}
        assert len(reasons) == 1
        assert "DoraCaching is on" in reasons.pop()
        assert torch.equal(logits(fused), logits(fused))
        assert all(caches)
        fused.train()
        assert explain(fused).fused_fraction == 1.0
        fused.eval()
        logits(fused)
    assert all(caches)
    for leaf in ("self_attn.k_proj", "mlp.up_proj", "self_attn.o_proj"):
        changes()["optimiser_step"](fused.get_submodule(f"base_model.model.model.layers.0.{leaf}"))
    changed = logits(fused)
    assert not any(caches), "a forward outside DoraCaching clears the cache, as PEFT's does"
    assert not torch.allclose(changed, expected, rtol=1e-10, atol=1e-10)
    with DoraCaching():
        torch.testing.assert_close(logits(fused), changed, rtol=1e-10, atol=1e-10)


def test_an_output_may_be_changed_in_place():
    """Falcon adds the attention's output to that of its MLP in place."""
    plain, fused = (
        model.get_submodule("base_model.model.model.layers.0.mlp.down_proj") for model in pair()
    )
    gradients = []
    for layer in (plain, fused):
        y = layer(torch.ones(2, layer.in_features, dtype=torch.float64))
        y += 1.0
        layer.zero_grad()
        y.square().sum().backward()
        gradients.append(layer.lora_magnitude_vector["default"].weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_checkpointing_gives_the_same_gradients():
    batch = pairs.inputs("llama", torch.float64)
    _, fused = pair()
    expected = pairs.step(fused, batch)
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    pairs.assert_close(pairs.step(fused, batch), expected, 1e-12)


def test_a_copy_is_whole():
    _, fused = pair()
    twin = copy.deepcopy(fused)
    assert torch.equal(logits(twin), logits(fused))
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(
        p.data_ptr() for p in fused.parameters()
    )


def test_wrap_strict_accepts_dora():
    model = wrap(models.tiny("llama"), LoraConfig(use_dora=True, r=4), strict=True)
    assert explain(model).fused_fraction == 1.0


def test_no_tensor_of_the_size_of_the_weight_is_allocated():
    """PEFT multiplies A by an identity ``[K, K]`` and computes ``B A`` and the updated weight."""
    sizes = []
    for fuse in (False, True):
        model = nn.Sequential(nn.Linear(700, 600, bias=False))
        model = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
        if fuse:
            accelerate(model)
        with Made(*model.parameters()) as made:
            model(torch.randn(3, 700)).sum().backward()
        sizes.append(made.largest_bytes)
    assert sizes[0] >= 4 * 700 * 600
    assert sizes[1] < 4 * 700 * 600 / 2


def mlp_of(dtype):
    """``x`` and the gate, up and down projections of a gated MLP, each with its DoRA; all but the weights are trained."""
    generator, D, F, R = torch.Generator().manual_seed(0), 24, 40, 4

    def draw(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values * shape[-1] ** -0.5).to(dtype)

    parts = []
    for N, K in ((F, D), (F, D), (D, F)):
        A, B, bias, magnitude = draw(R, K), draw(N, R), draw(N), draw(N) + 1.0
        for leaf in (A, B, bias, magnitude):
            leaf.requires_grad_()
        parts.append(LinearParts(draw(N, K), bias, LoRA(A, B, 1.5), magnitude))
    return draw(2, 9, D).requires_grad_(), parts


def mlp_step(dtype):
    """The output and the gradients."""
    x, parts = mlp_of(dtype)
    y = gated_mlp(x, parts, "silu")
    leaves = [x, *(t for part in parts for t in (part.lora.A, part.lora.B, *part[1::2]))]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_on_a_gpu_the_middle_of_an_mlp_is_one_pass_each_way_and_is_not_saved(monkeypatch):
    truth, plain = mlp_step(torch.float64), mlp_step(torch.float32)
    for op in ("lora_linear", "lora_qkv", "dora", "dora_scale"):
        module = f"peftkit_kernels.ops.{op}.op.choose_backend"
        monkeypatch.setattr(module, lambda *_, **__: "triton")
    with Traffic() as traffic, faithful():
        actual = mlp_step(torch.float32)
    launched = Counter(launch.kernel for launch in traffic.check().launches)
    assert launched["scaled_gate_kernel"] == 2, (
        "once in the forward, and recomputed for the down projection"
    )
    assert launched["scaled_gate_backward_kernel"] == 1
    assert launched["scale_kernel"] == launched["scale_backward_kernel"] == 1
    assert len(actual) == 14
    for i, values in enumerate(zip(actual, plain, truth, strict=True)):
        assert_no_worse_than(*values, f"result {i}")
