"""4-bit linears whose rows are no whole blocks are decoded as they are stored, on the CPU too."""

import bitsandbytes as bnb
import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peftkit import ContractError, accelerate, load_base, merge, restore, wrap
from peftkit.compatibility.rounding import same_up_to_rounding

N, BLOCKSIZE = 40, 64


def four_bit(columns, quant_type="nf4", nested=False):
    """A layer, the weight that was quantised, and what is stored of it by definition."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        columns,
        N,
        quant_type=quant_type,
        compress_statistics=nested,
        compute_dtype=torch.float32,
    )
    weight = torch.randn(N, columns)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), False, quant_type=quant_type, compress_statistics=nested, module=layer
    )
    layer.to("cpu")
    state = layer.weight.quant_state
    codes = layer.weight.data.flatten().int()
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).flatten()][: weight.numel()]
    maxima = state.absmax
    if nested:
        maxima = bnb.functional.dequantize_blockwise(maxima, state.state2) + state.offset
    stored = values * maxima.repeat_interleave(BLOCKSIZE)[: weight.numel()]
    return layer, weight, stored.view_as(weight)


def adapted(base, **options):
    """PEFT's adapters, for 4-bit layers as in a model of transformers."""
    base.is_loaded_in_4bit = True
    return get_peft_model(base, LoraConfig(r=4, **options))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [32, 48, 96, 160])
def test_with_and_without_an_adapter(columns, quant_type, nested):
    layers = [four_bit(columns, quant_type, nested) for _ in range(2)]
    base = nn.Sequential(*(nn.Sequential(layer) for layer, _, _ in layers)).eval()
    model = accelerate(adapted(base, target_modules=["0.0"]))
    _, weight, stored = layers[0]
    assert (stored - weight).norm() < 0.13 * weight.norm()
    for layer in (model.base_model.model[0][0], model.base_model.model[1][0]):
        x = torch.randn(5, columns, requires_grad=True)
        y = layer(x)
        assert same_up_to_rounding(y, x @ stored.T + layer.bias, 1.0)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert same_up_to_rounding(dx, stored.sum(0).expand_as(x), 1.0)
    restore(model)
    assert type(model.base_model.model[1][0]) is bnb.nn.Linear4bit


def test_a_new_dora_changes_nothing_and_a_trained_one_keeps_its_magnitude():
    layer, _, stored = four_bit(48)
    peft_model = adapted(nn.Sequential(layer), target_modules=["0"], use_dora=True)
    trained = peft_model.base_model.model[0].lora_magnitude_vector["default"].weight
    x = torch.randn(5, 48)
    y = accelerate(peft_model)(x)
    assert same_up_to_rounding(y, x @ stored.T + layer.bias, 1.0)
    peft_model.base_model.model[0].lora_B["default"].weight.data.fill_(0.1)
    trained.data.fill_(3.0)
    accelerate(restore(peft_model))
    assert (trained == 3.0).all()


def test_pefts_merge_is_refused(tmp_path):
    layer = four_bit(48)[0]
    model = accelerate(adapted(nn.Sequential(layer), target_modules=["0"]))
    before = layer.weight.data.clone()
    with pytest.raises(ContractError, match=r"rows of 48 .* use peftkit\.merge"):
        model.merge_and_unload()
    assert torch.equal(layer.weight.data, before)


def test_whole_blocks_run_bitsandbytes_forward():
    layer = four_bit(128)[0]
    accelerate(
        get_peft_model(nn.Sequential(layer, nn.Linear(N, 4)), LoraConfig(target_modules="1"))
    )
    assert type(layer) is bnb.nn.Linear4bit


def test_a_loaded_base_and_the_model_that_is_merged_are_the_same(tmp_path):
    """The certificate compares what is stored; the layers must have computed with it."""
    models.tiny("llama").save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", "nf4", auto_class="AutoModelForCausalLM")
    model = wrap(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    found = merge(model, tmp_path / "merged", "fp32", min_recovery=None)
    assert found.recovery > 0.999
    batch = {"input_ids": models.batch("llama")["input_ids"]}
    merged = load_base(tmp_path / "merged", "fp32", auto_class="AutoModelForCausalLM")
    model.eval()
    with torch.no_grad():
        expected = merged(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        restore(model)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
