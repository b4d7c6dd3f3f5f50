"""``load_base`` of a model that is already in memory."""

import base_cases
import models
import pytest
import torch
import transformers as hf
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from peftkit import base_report, explain, load_base, wrap


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "opt"])
def test_it_becomes_what_is_loaded_from_its_checkpoint(tmp_path, name, base):
    tiny = models.tiny(name, dtype=torch.bfloat16)
    tiny.save_pretrained(tmp_path)
    original = type(tiny).from_pretrained(tmp_path, dtype="auto").train()

    model = load_base(original, base)

    assert model is original
    expected = load_base(tmp_path, base)
    base_cases.assert_same(model, expected)
    assert vars(model).keys() >= vars(expected).keys()
    assert model.training
    model.save_pretrained(tmp_path / "again")
    base_cases.assert_same(load_base(tmp_path / "again"), expected)


def test_it_trains_like_the_loaded_model(tmp_path):
    base_cases.save_llama(tmp_path)
    built = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(12)[None]
    runs = []
    for model in (load_base(built, "nf4"), load_base(tmp_path, "nf4")):
        torch.manual_seed(0)
        model = wrap(model).train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        runs.append((explain(model), loss.item()))
    assert runs[0] == runs[1]
    assert runs[0][0].fused_fraction == 1


def test_a_module_of_torch():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer), nn.Linear(64, 8))
    x = torch.randn(4, 64)
    expected = model(x)

    load_base(model, "nf4", keep=["3"])

    assert type(model[0]) is Linear4bit
    assert model[2][0] is model[0]
    assert type(model[3]) is nn.Linear
    assert (model(x) - expected).norm() < 0.2 * expected.norm()
    assert base_report(model).kind == "nf4"


def test_tied_linears_are_kept():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight

    load_base(model, "nf4")

    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, Linear4bit]
    assert model[1].weight is model[0].weight
    assert "tied" in base_report(model).kept["0.weight"]


@pytest.mark.parametrize(("base", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_casting_leaves_buffers_and_exceptions_in_float32(base, dtype):
    model = load_base(models.tiny("t5"), base)

    linear = model.encoder.block[0].layer[0].SelfAttention.q
    assert linear.weight.dtype is dtype
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    assert model.config.dtype is dtype
    llama = load_base(models.tiny("llama"), base)
    assert llama.model.rotary_emb.inv_freq.dtype is torch.float32


def test_auto_and_the_same_kind_change_nothing():
    model = models.tiny("llama")
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    assert load_base(model) is model
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before

    load_base(model, "nf4")
    modules = [id(module) for module in model.modules()]
    load_base(model, "nf4")
    assert [id(module) for module in model.modules()] == modules
