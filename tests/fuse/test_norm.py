"""Which norms are fused, by which formula, and when they run their own forward again."""

import copy

import models
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftkit import BottleneckConfig, wrap
from peftkit.fuse.norm import FusedNorm, fuse_norms

WIDTH = 32


def frozen(norm, dtype=torch.float32):
    """A norm with weights that are not one, and its fused twin."""
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    norm = norm.to(dtype).requires_grad_(False)
    twin = copy.deepcopy(norm)
    return norm, twin, fuse_norms(twin)


class NoWeight(nn.Module):
    """A norm in name only."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6


class OtherNorm(LlamaRMSNorm):
    """Something else in the end."""

    def forward(self, x):
        return super().forward(x) * 1.001


class Centred(LlamaRMSNorm):
    """Takes the mean away first."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("cls", "formula"),
    [
        (LlamaRMSNorm, {"kind": "rms", "offset": 0.0}),
        (T5LayerNorm, {"kind": "rms", "offset": 0.0}),
        (Gemma3RMSNorm, {"kind": "rms", "offset": 1.0}),
        (nn.LayerNorm, {"kind": "layer"}),
    ],
)
def test_known_norms_give_their_own_output(cls, formula, dtype):
    norm, fused, count = frozen(cls(WIDTH, eps=1e-3), dtype)
    assert count == 1
    assert formula.items() <= fused._peftkit_norm.items()
    assert isinstance(fused, cls)
    x = torch.randn(5, 7, WIDTH).to(dtype).requires_grad_()
    y, expected = fused(x), norm(x)
    # the sums may differ in their last bit in float32, and so a value that lies between two of 16 bits
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    dy = torch.randn(5, 7, WIDTH).to(dtype)
    (dx,), (dx_expected,) = (torch.autograd.grad(out, x, dy) for out in (y, expected))
    tolerance = 4 * torch.finfo(dtype).eps * dx_expected.abs().max().item()
    torch.testing.assert_close(dx, dx_expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    "norm",
    [
        NoWeight(),
        OtherNorm(WIDTH),
        Centred(WIDTH),
        nn.LayerNorm((4, WIDTH)),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.GroupNorm(4, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.Linear(WIDTH, WIDTH),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_anything_else_is_left_alone(norm):
    _, twin, count = frozen(norm)
    assert count == 0
    assert not isinstance(twin, FusedNorm)


def test_a_trained_or_hooked_norm_is_left_alone():
    trained, hooked = LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH).requires_grad_(False)
    hooked.register_forward_hook(lambda *args: None)
    assert fuse_norms(nn.ModuleList([trained, hooked])) == 0


def test_an_adapters_own_norm_is_left_alone_when_it_is_frozen_too():
    config = BottleneckConfig(bottleneck_size=4, layer_norm=True)
    model = wrap(models.tiny("llama").eval(), config).requires_grad_(False)
    own = [m for n, m in model.named_modules() if n.endswith("adapters.default.norm")]
    assert len(own) == 4
    assert fuse_norms(model) == 0, "wrap has fused the model's"
    assert {type(m) for m in own} == {nn.LayerNorm}


def test_float64_is_left_to_modules_that_compute_it_in_float32():
    assert frozen(LlamaRMSNorm(WIDTH), torch.float64)[2] == 0
    assert frozen(nn.LayerNorm(WIDTH), torch.float64)[2] == 1


def test_a_norm_with_a_gate_still_takes_it():
    norm, fused, count = frozen(Qwen3NextRMSNormGated(WIDTH))
    x, gate = torch.randn(2, 3, WIDTH).unbind(0)
    assert torch.equal(fused(x, gate), norm(x, gate))
    assert torch.equal(fused(x, gate=gate), norm(x, gate=gate))
    assert count in (0, 1)


def test_arguments_by_name_run_the_modules_own_forward():
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    x = torch.randn(3, WIDTH)
    assert torch.equal(fused(hidden_states=x), norm(hidden_states=x))


@pytest.mark.parametrize("change", ["trained", "other_dtype", "autocast"])
def test_what_the_formula_does_not_cover_runs_the_modules_own_forward(change):
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    x = torch.randn(3, WIDTH)
    if change == "trained":
        norm.weight.requires_grad_()
        fused.weight.requires_grad_()
        assert fused.peftkit_verdict() == ("peft", "its weight is trained")
        grads = [torch.autograd.grad(m(x).square().sum(), m.weight)[0] for m in (fused, norm)]
        assert torch.equal(*grads)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        x = x.bfloat16() if change != "trained" else x
        assert fused(x).dtype == norm(x).dtype
        assert torch.equal(fused(x), norm(x))


@pytest.mark.parametrize("name", models.NAMES)
def test_every_norm_of_the_tiny_models_is_fused(name):
    model = models.tiny(name).requires_grad_(False)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert fuse_norms(model) == len(norms) > 0
    assert all(isinstance(m, FusedNorm) for m in norms)
