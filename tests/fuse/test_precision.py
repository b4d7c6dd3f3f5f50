"""A wrapped layer is as precise as PEFT's: float32 adapters on a 16-bit base, PEFT's default, are computed in float32."""

import copy

import pytest
import torch
from pairs import fill_factors
from peft import LoraConfig, get_peft_model
from torch import nn

import peftkit

CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def step(model, x, dy):
    """The output, and the gradients of the input and of every adapter tensor, by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **named}


@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["gradients_of_1", "gradients_of_1e-4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_no_further_from_float64_than_twice_as_far_as_peft(config, dtype, size):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80)).to(dtype)
    x = torch.randn(64, 96, generator=generator).to(dtype)
    dy = (torch.randn(64, 80, generator=generator) * size).to(dtype)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **CONFIGS[config])
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(settings))
    fused = peftkit.wrap(copy.deepcopy(base), settings)
    for model in (plain, fused):
        fill_factors(model)
    truth = step(copy.deepcopy(plain).double(), x.double(), dy.double())
    expected, actual = step(plain, x, dy), step(fused, x, dy)
    assert actual.keys() == expected.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        assert "lora_" not in name or value.dtype is torch.float32
        off, allowed = ((v.double() - truth[name]).norm() for v in (value, expected[name]))
        assert off <= 2 * allowed, f"{name}: {off:.3g}, PEFT {allowed:.3g}"
