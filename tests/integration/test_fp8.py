"""Models in float8: gradients near those of the decoded model, fused layers equal to PEFT's, every method, every mode of training."""

import copy

import models
import pairs
import pytest
import torch
from lora_cases import subsets
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftkit import (
    BottleneckConfig,
    ContractError,
    LoraConfig,
    PrefixConfig,
    accelerate,
    explain,
    from_fp8,
    restore,
    to_fp8,
    wrap,
)
from peftkit.export.weights import merged_weights
from peftkit.fuse.float8 import FusedFloat8Linear
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.fp8.product import torch_impl

LAYERS = 2
LINEARS = 7 * LAYERS


def stock(name="llama", dtype=torch.float32, model=None, **config):
    """A tiny model in float8 with PEFT's LoRA; no factor is zero."""
    return pairs.adapted(to_fp8(model or models.tiny(name, dtype=dtype)), **config)


def wide_llama():
    """Wide enough that the errors of single codes average out."""
    torch.manual_seed(0)
    config = LlamaConfig(**models._DECODER | {"hidden_size": 256, "intermediate_size": 512})
    return LlamaForCausalLM(config)


def adapters(model):
    return [row for row in explain(model).layers if row.is_adapter]


def distance(one, other):
    return (one.double() - other.double()).norm()


def assert_nearer(found, expected, decoded):
    """``found`` is nearer to ``expected`` than half of what float8 changes: only single codes may differ, by one step.

    A code of the next layer differs where its input, a sum in another order, lies at the border of two codes.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(found[name], value) <= 0.5 * distance(value, decoded[name]), name


def cosine(one, other):
    return torch.cosine_similarity(one.double().flatten(), other.double().flatten(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_every_layer_is_near_that_of_the_decoded_model(dtype):
    fused = accelerate(stock(model=wide_llama().to(dtype)))
    assert {row.path for row in adapters(fused)} == {"fused:torch"}
    decoded = from_fp8(copy.deepcopy(fused))
    batch = pairs.inputs("llama")
    found, expected = pairs.step(fused, batch), pairs.step(decoded, batch)
    assert len(found) == 1 + 2 * LINEARS
    for name, value in expected.items():
        assert not torch.equal(found[name], value)
        if name != "loss":
            assert cosine(found[name], value) >= 0.99, name
    assert (found["loss"] - expected["loss"]).abs() < 0.01 * expected["loss"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["llama", "bert", "phi3", "t5"])
def test_fused_layers_equal_those_of_peft(name, use_dora):
    plain = stock(name, use_dora=use_dora)
    fused = accelerate(copy.deepcopy(plain))
    assert all(row.path == "fused:torch" for row in adapters(fused))
    batch = pairs.inputs(name)
    expected = pairs.step(plain, batch)
    assert_nearer(
        pairs.step(fused, batch), expected, pairs.step(from_fp8(copy.deepcopy(plain)), batch)
    )
    assert restore(fused) is fused
    pairs.assert_equal(pairs.step(fused, batch), expected)


def test_the_inputs_are_quantised_once(monkeypatch):
    calls = {"quantize_input": 0, "input_grad": 0}
    for name, run in [(name, getattr(torch_impl, name)) for name in calls]:

        def count(*args, name=name, run=run):
            calls[name] += 1
            return run(*args)

        monkeypatch.setattr(torch_impl, name, count)
    pairs.step(wrap(to_fp8(models.tiny("llama")), LoraConfig(r=4)), pairs.inputs("llama"))
    # the inputs of q, k and v; of o; of gate and up; of down. Nothing trained is below the first q, k and v
    assert calls == {"quantize_input": LAYERS * 4, "input_grad": LINEARS - 3}


def test_dora_with_float32_factors_on_16_bit_activations_multiplies_in_float8(monkeypatch):
    model = accelerate(stock(dtype=torch.bfloat16, use_dora=True))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.lora_A["default"].weight.dtype is torch.float32
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    calls = []
    run = torch_impl.quantize_input
    monkeypatch.setattr(torch_impl, "quantize_input", lambda x: calls.append(x) or run(x))
    found = layer(x)
    assert len(calls) == 1
    assert cosine(found, restore(layer)(x)) > 0.9999


@pytest.mark.parametrize("trained", subsets(("x", "A", "B", "bias")), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    model = stock("bert")
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    tensors = {
        "x": torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "bias": layer.base_layer.bias,
    }

    def run(layer):
        y = layer(tensors["x"])
        grads = torch.autograd.grad(y.square().sum(), [tensors[name] for name in trained])
        return [y, *grads]

    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    expected = run(layer)
    accelerate(model)
    assert isinstance(layer, FusedFloat8Linear)
    for found, value in zip(run(layer), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_bit(reentrant, lora_dropout):
    fused = accelerate(stock(lora_dropout=lora_dropout))
    checkpointed = copy.deepcopy(fused)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    results = []
    for model in (fused, checkpointed):
        torch.manual_seed(0)
        results.append(pairs.step(model, pairs.inputs("llama")))
    pairs.assert_equal(*results)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_under_torch_compile():
    model = accelerate(stock(), logit_free=False)
    batch = pairs.inputs("llama")
    expected = pairs.step(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    decoded = pairs.step(from_fp8(copy.deepcopy(model)), batch)
    assert_nearer({"loss": loss.detach(), **trained}, expected, decoded)


def test_under_autocast():
    model = accelerate(stock())
    batch = pairs.inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(row.path == "fused:torch" for row in adapters(model))
        found = pairs.step(model, batch)
        decoded_in_16_bits = pairs.step(from_fp8(copy.deepcopy(model)), batch)
    decoded = pairs.step(from_fp8(copy.deepcopy(model)), batch)
    for name, value in pairs.step(model, batch).items():
        # float8 changes as much as without autocast; twice, because 16-bit inputs have other codes
        changed = distance(value, decoded[name])
        assert distance(found[name], decoded_in_16_bits[name]) <= 2 * changed, name


def test_adapters_have_the_dtype_of_the_weight_before_it_was_quantised():
    model = to_fp8(models.tiny("llama", dtype=torch.bfloat16))
    narrow = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    wide = wrap(model, LoraConfig(r=4, use_dora=True))
    for adapted, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
        assert trained == {dtype}


def test_explain_names_the_storage():
    report = explain(wrap(to_fp8(models.tiny("llama")), LoraConfig(r=4)))
    stored = sum(
        p.numel() for p in to_fp8(models.tiny("llama")).parameters() if p.dtype.itemsize == 1
    )
    assert report.storage["fp8"] == stored
    assert {row.path for row in report.layers if row.is_adapter} == {"fused:torch"}


def test_a_decoded_layer_is_fused_too():
    model = accelerate(stock(), strict=True)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.zeros(2, 48)
    assert type(layer.peftkit_plan(x).weight) is Float8Weight
    from_fp8(model)
    assert type(layer.peftkit_plan(x).weight) is torch.nn.Parameter


def test_merging():
    model = accelerate(stock())
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(ContractError, match=r"cannot be merged .* peftkit.from_fp8\(model\)"):
            merge()
    ids = models.batch("llama")["input_ids"]
    from_fp8(model).eval()
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_stock_peft_does_not_merge_into_codes(safe):
    model = stock()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.view(torch.uint8).clone()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"Float8"):
        model.merge_adapter(safe_merge=safe)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight.view(torch.uint8), before)


def test_exported_weights_are_decoded_and_merged():
    model = stock()
    found = {
        weight.name: weight.load() for weight in merged_weights(accelerate(copy.deepcopy(model)))
    }
    merged = from_fp8(model).merge_and_unload()
    for name, value in merged.state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name].to(value.dtype), value, msg=name)
    assert sum("proj" in name for name in found) == LINEARS


def test_disabled_adapters_leave_the_base_model():
    base = to_fp8(models.tiny("llama"))
    ids = models.batch("llama")["input_ids"]
    expected = base(ids).logits
    decoded = from_fp8(copy.deepcopy(base))(ids).logits
    model = wrap(base, LoraConfig(r=4))
    assert distance(model(ids).logits, expected) <= 0.5 * distance(expected, decoded)
    pairs.fill_factors(model)
    with model.disable_adapter():
        found = model(ids).logits
    # the fused norms sum in another order
    assert distance(found, expected) <= 0.5 * distance(expected, decoded)
    assert distance(model(ids).logits, expected) > 2 * distance(expected, decoded)


def test_adapters_are_saved_and_loaded_by_peft(tmp_path):
    model = accelerate(stock())
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(to_fp8(models.tiny("llama")), tmp_path).eval()
    ids = models.batch("llama")["input_ids"]
    assert torch.equal(accelerate(again)(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    "config",
    [BottleneckConfig(reduction_factor=4), PrefixConfig(num_virtual_tokens=3), LoraConfig(r=4)],
    ids=lambda c: type(c).__name__,
)
def test_every_method_trains(config):
    base = to_fp8(models.tiny("llama"))
    batch = pairs.inputs("llama")
    model = wrap(base, config)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(5):
        losses.append(pairs.step(model, batch)["loss"])
        optimiser.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_weight_are_refused_by_peft(init):
    model = to_fp8(models.tiny("llama"))
    with pytest.raises(TypeError, match=r"float8|under float32"):
        wrap(model, LoraConfig(r=4, init_lora_weights=init))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_generation():
    model = accelerate(stock()).eval()
    ids = models.batch("llama")["input_ids"][:1]
    plain = restore(copy.deepcopy(model))
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
