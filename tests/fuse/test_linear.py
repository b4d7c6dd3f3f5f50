"""Fused layers under everything that PEFT does to a layer: the numbers equal PEFT's, and unsupported cases run PEFT's code."""

import copy
import io
import pickle

import models
import pairs
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

from peftkit import accelerate, explain, restore
from peftkit.fuse.linear import FusedLinear, fuse_layer

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = "lora_linear", "lora_qkv", "lora_swiglu_mlp"


@pytest.fixture
def runs(monkeypatch):
    """Compare both models on one step; returns how many LoRA ops and how many of PEFT's own forwards ran."""

    def run(plain, fused, name="llama", rtol=1e-10):
        batch = pairs.inputs(name, torch.float64)
        with pairs.counted(monkeypatch) as calls:
            actual = pairs.step(fused, batch, pairs.loss_from_logits)
        pairs.assert_close(actual, pairs.step(plain, batch, pairs.loss_from_logits), rtol)
        return sum(calls[op] for op in OPS), calls["peft"]

    return run


def pair(name="llama", **config):
    return pairs.pair(name, torch.float64, logit_free=False, **config)


def both(models_, action):
    """Call a function on both models; returns the results."""
    return [action(model) for model in models_]


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**pairs.inputs(name, torch.float64)).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def verdicts(model):
    return {(layer.path, layer.reason) for layer in explain(model).layers if layer.is_adapter}


def test_classes_inherit_from_pefts_and_keep_their_names():
    plain, fused = pair()
    for a, b in zip(plain.modules(), fused.modules(), strict=True):
        assert isinstance(b, type(a))
        assert type(b).__name__ == type(a).__name__
        assert repr(b) == repr(a)
    assert all(isinstance(layer, FusedLinear) for layer in layers(fused))


def test_state_dict_parameters_and_adapter_file_equal_pefts(tmp_path):
    plain, fused = pair()
    pairs.assert_equal(fused.state_dict(), plain.state_dict())
    names = [
        [n for n, p in model.named_parameters() if p.requires_grad] for model in (plain, fused)
    ]
    assert names[0] == names[1]
    both((plain, fused), lambda model: model.save_pretrained(tmp_path / str(model is fused)))
    files = [(tmp_path / str(kind) / "adapter_model.safetensors") for kind in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_switching_adapters(runs):
    plain, fused = pair()
    for model in (plain, fused):
        model.add_adapter(
            "second", LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "up_proj"])
        )
        pairs.fill_factors(model, seed=5)
    for name, expected in (("default", (6, 0)), ("second", (4, 10)), ("default", (6, 0))):
        both((plain, fused), lambda model, name=name: model.set_adapter(name))
        assert runs(plain, fused) == expected, name


def test_an_adapter_on_new_modules_is_fused_too(runs):
    plain, fused = pair(target_modules=["q_proj"])
    assert len(layers(fused)) == 2
    for model in (plain, fused):
        model.add_adapter(
            "second", LoraConfig(r=3, target_modules=["v_proj", "down_proj", "q_proj"])
        )
        model.set_adapter("second")
        pairs.fill_factors(model, seed=5)
    assert all(isinstance(layer, FusedLinear) for layer in layers(fused))
    assert runs(plain, fused) == (4, 0)


def test_an_adapter_loaded_later_is_fused_too(runs, tmp_path):
    saved = pairs.stock("llama", torch.float64, target_modules=["o_proj", "gate_proj"])
    saved.save_pretrained(tmp_path)
    plain, fused = pair(target_modules=["q_proj"])
    for model in (plain, fused):
        model.load_adapter(tmp_path, "other", is_trainable=True)
        model.set_adapter("other")
    assert runs(plain, fused) == (4, 2)


def test_deleting_adapters(runs):
    plain, fused = pair()
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
        pairs.fill_factors(model, seed=5)
        model.delete_adapter("second")
    assert runs(plain, fused) == (6, 0)


def test_disabled_adapters_leave_the_base_model():
    _, fused = pair()
    base = logits(models.tiny("llama", dtype=torch.float64))
    with_adapter = logits(fused)
    with fused.disable_adapter():
        assert torch.equal(logits(fused), base)
        assert verdicts(fused) == {("peft", "adapters are disabled")}
    assert torch.equal(logits(fused), with_adapter)
    assert not torch.equal(base, with_adapter)
    assert verdicts(fused) == {("fused:torch", "")}


def test_the_report_names_what_runs(monkeypatch):
    _, fused = pair()
    asked = []

    def choose(op, backend, x, *, rank, own_obstacle=None):
        asked.append((op, backend, x.dtype, rank))
        return "triton"

    monkeypatch.setattr("peftkit.fuse.compute.choose_backend", choose)
    assert verdicts(fused) == {("fused:triton", "")}
    rank = next(layer for layer in fused.modules() if isinstance(layer, FusedLinear)).r["default"]
    assert set(asked) == {
        (op, "auto", torch.float64, rank) for op in ("lora_linear", "lora_swiglu_mlp")
    }


def test_merging_and_unmerging():
    plain, fused = pair()
    before = copy.deepcopy(fused.state_dict())
    expected = logits(plain)
    both((plain, fused), lambda model: model.merge_adapter())
    assert torch.equal(logits(fused), logits(plain))
    ((path, reason),) = verdicts(fused)
    assert path == "peft"
    assert "merged into the base weight (default)" in reason
    both((plain, fused), lambda model: model.unmerge_adapter())
    torch.testing.assert_close(logits(fused), expected, rtol=1e-10, atol=1e-10)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, before[name])
    merged = [model.merge_and_unload() for model in (plain, fused)]
    assert torch.equal(logits(merged[1]), logits(merged[0]))
    assert not layers(merged[1])


def test_dropout_modules_in_evaluation_mode_drop_nothing(runs):
    plain, fused = pair(lora_dropout=0.5)
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    assert runs(plain, fused) == (6, 0)


def test_scaling_is_read_in_every_forward(runs):
    plain, fused = pair()
    runs(plain, fused)
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.update(default=-1.0),
    ):
        before = logits(fused)
        for model in (plain, fused):
            both(layers(model), change)
        assert runs(plain, fused) == (6, 0)
        assert not torch.equal(logits(fused), before)


def test_a_bias_of_its_own_runs_pefts_forward(runs):
    plain, fused = pair("opt", lora_bias=True)
    assert runs(plain, fused, "opt") == (0, 12)
    ((path, why),) = verdicts(fused)
    assert path == "peft"
    assert "has a bias of its own (lora_bias=True)" in why


def test_rank_stabilised_and_patterned_adapters_are_fused(runs):
    config = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up_proj": 40}}
    assert runs(*pair(**config)) == (6, 0)


def test_activated_lora_runs_pefts_forward():
    models_ = pair(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    plain, fused = (model.eval() for model in models_)
    batch = pairs.inputs("llama")
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(fused(**batch).logits, plain(**batch).logits)
    ((path, reason),) = verdicts(fused)
    assert path == "peft"
    assert "ALoraLinearVariant" in reason


def test_batches_that_mix_adapters_run_pefts_forward(monkeypatch):
    plain, fused = pair()
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        pairs.fill_factors(model, seed=5)
        model.eval()
    batch = pairs.inputs("llama")
    with torch.no_grad(), pairs.counted(monkeypatch) as calls:
        actual = fused(**batch, adapter_names=["second", "default"]).logits
        assert calls["peft"] == 14
        assert not any(calls[op] for op in OPS)
        assert torch.equal(actual, plain(**batch, adapter_names=["second", "default"]).logits)


def test_several_active_adapters_run_pefts_forward(runs):
    plain, fused = pair()
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        pairs.fill_factors(model, seed=5)
        model.base_model.set_adapter(["default", "second"])
    # the MLP of this down_proj is not fused either; k and v no longer share the input with q
    ops, peft = runs(plain, fused)
    assert (ops, peft) == (10, 4)
    reasons = {reason for path, reason in verdicts(fused) if path == "peft"}
    assert reasons == {"2 adapters are active (default, second); exactly one can be fused"}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_parts_of_a_layer_are_run(runs, part, kind):
    plain, fused = pair()
    seen = []
    for model in (plain, fused):
        layer = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
        module = getattr(layer, part)
        module = module["default"] if part != "base_layer" else module
        register = getattr(module, f"register_{kind}_hook")
        register(lambda *args: seen.append(type(args[0])))
    assert runs(plain, fused)[1] == 1
    assert len(seen) == 2
    assert len(verdicts(fused)) == 2


def test_hooks_on_a_layer_get_its_output(runs):
    plain, fused = pair()
    for model in (plain, fused):
        for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            layer = model.get_submodule(f"base_model.model.model.layers.0.{name}")
            layer.register_forward_hook(lambda module, args, output: output * 1.5)
    ops, peft = runs(plain, fused)
    assert (ops, peft) == (5 + 3, 0)


def test_a_trained_base_runs_pefts_forward(runs):
    plain, fused = pair()
    for model in (plain, fused):
        layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
        layer.base_layer.weight.requires_grad_()
    assert runs(plain, fused)[1] == 1
    assert ("peft", "its base layer is trained") in verdicts(fused)


def test_a_layer_of_another_method_runs_pefts_forward():
    base = get_peft_model(models.tiny("llama"), LoHaConfig(target_modules=["q_proj"]))
    accelerate(base)
    assert not any(isinstance(module, FusedLinear) for module in base.modules())
    assert verdicts(base) == {("peft", "LOHA has no fused forward")}


def test_arguments_of_the_forward_are_passed_on(monkeypatch):
    _, fused = pair()
    layer = layers(fused)[0]
    with pairs.counted(monkeypatch) as calls:
        layer(torch.randn(2, layer.in_features).double(), adapter_names=["default", "__base__"])
    assert calls == {"peft": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_runs_pefts_forward(dtype, monkeypatch):
    plain, fused = pairs.pair("llama")
    one, other = layers(plain)[0], layers(fused)[0]
    x = torch.randn(3, one.in_features).to(dtype)
    with pairs.counted(monkeypatch) as calls:
        outcomes = []
        for layer in (one, other):
            try:
                outcomes.append(str(layer(x).dtype))
            except RuntimeError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert calls["peft"] == 2


def test_replaced_weights_are_used(runs):
    plain, fused = pair()
    runs(plain, fused)
    for model in (plain, fused):
        for layer in layers(model)[::2]:
            generator = torch.Generator().manual_seed(1)
            new = torch.randn(layer.out_features, 2, generator=generator).double()
            layer.lora_B["default"].weight = nn.Parameter(new)
            layer.lora_A["default"] = nn.Linear(layer.in_features, 2, bias=False).double()
            nn.init.constant_(layer.lora_A["default"].weight, 0.1)
            layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 2, requires_grad=False)
    assert runs(plain, fused) == (6, 0)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5", "vit"])
def test_copies_and_pickles_work(name, monkeypatch):
    _, fused = pairs.pair(name)
    batch = pairs.inputs(name)
    fused(**batch)
    expected = pairs.step(fused, batch)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(fused), loaded, pickle.loads(pickle.dumps(fused))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
        with pairs.counted(monkeypatch) as calls:
            actual = pairs.step(twin, batch)
        pairs.assert_equal(actual, expected)
        with pairs.counted(monkeypatch) as own:
            pairs.step(fused, batch)
        assert calls == own
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(
            p.data_ptr() for p in fused.parameters()
        )


def test_only_pefts_own_class_is_fused():
    class Mine(Linear):
        pass

    layer = layers(pairs.stock("llama"))[0]
    assert not fuse_layer(nn.Linear(2, 2))
    mine = copy.copy(layer)
    mine.__class__ = Mine
    assert not fuse_layer(mine)
    assert fuse_layer(layer)
    assert not fuse_layer(layer)
    restore(layer)
    assert type(layer) is Linear
    restore(layer)
    assert type(layer) is Linear
