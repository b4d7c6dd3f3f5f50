"""LoRA and DoRA on 4-bit and 8-bit bitsandbytes linears, fused on their storage: PEFT's numbers on the CPU."""

import copy

import bitsandbytes as bnb
import pairs
import pytest
import torch
from integration.support import fused_calls
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from peftkit import accelerate, explain
from peftkit.fuse.quantized import FusedLinear4bit, FusedLinear8bitLt

K, N = 128, 64
"""Whole blocks: where they straddle rows, bitsandbytes' own decoding on the CPU is wrong."""


class Base(nn.Module):
    """One quantised linear, as transformers marks its models."""

    def __init__(self, linear, bits):
        super().__init__()
        self.proj = linear
        setattr(self, f"is_loaded_in_{bits}bit", True)

    def forward(self, x):
        return self.proj(x)


def four_bit(bias=True, compute=torch.float32, dtype=torch.float32, **options):
    settings = {"quant_type": "nf4", "compress_statistics": False} | options
    linear = bnb.nn.Linear4bit(K, N, bias=bias, compute_dtype=compute, **settings)
    return filled(linear, dtype).to("cpu")


def eight_bit(bias=True, threshold=0.0):
    linear = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False, threshold=threshold)
    return filled(linear).to("cpu")


def filled(linear, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    state = {"weight": (torch.randn(N, K, generator=generator) / 10).to(dtype)}
    if linear.bias is not None:
        state["bias"] = torch.randn(N, generator=generator)
    linear.load_state_dict(state)
    return linear


BASES = {
    "nf4": lambda: (four_bit(), 4),
    "nested": lambda: (four_bit(compress_statistics=True), 4),
    "no bias": lambda: (four_bit(bias=False), 4),
    "bf16 storage": lambda: (four_bit(quant_storage=torch.bfloat16), 4),
    "int8": lambda: (eight_bit(), 8),
    "int8, threshold": lambda: (eight_bit(bias=False, threshold=6.0), 8),
}


def pair(base, **config):
    """The same layer under PEFT and fused, in training."""
    linear, bits = BASES[base]() if isinstance(base, str) else base
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"]} | config
    models = [
        get_peft_model(Base(copied, bits), LoraConfig(**settings))
        for copied in (linear, copy.deepcopy(linear))
    ]
    for model in models:
        pairs.fill_factors(model)
        model.train()
    plain, fused = models
    return plain, accelerate(fused)


def draw(rows=17):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1))


def step(model, x, dtype=torch.float32):
    x = x.to(dtype, copy=True).requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def truth(model, x):
    """PEFT's formula in float64 on the weight that bitsandbytes decodes."""
    layer = model.base_model.model.proj
    base = layer.get_base_layer()
    if hasattr(base, "state"):
        # PEFT's own decoding of an 8-bit layer on the CPU loses its scales
        weight = base.state.CB.double() * base.state.SCB.double()[:, None] / 127
    else:
        weight = dequantize_module_weight(base).double()
    linear = nn.Linear(K, N, bias=layer.bias is not None).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    name = "default"
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["proj"], use_dora=bool(layer.use_dora[name])
    )
    dense = get_peft_model(Base(linear, 16), config).double()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            if "lora_" in key:
                parameter.copy_(own[key])
    return step(dense, x, torch.float64)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_is_as_near_to_float64_as_pefts(base, dora):
    expected, runs = FusedLinear8bitLt if "int8" in base else FusedLinear4bit, []
    for seed in range(4):
        # PEFT's DoRA on an 8-bit layer on the CPU fails in its second forward
        plain, fused = pair(base, use_dora=dora)
        assert isinstance(fused.base_model.model.proj, expected)
        x = torch.randn(17, K, generator=torch.Generator().manual_seed(seed))
        with fused_calls() as calls:
            actual = step(fused, x)
        assert calls["nf4_linear"] + calls["int8_linear"] == 1
        stock = step(plain, x)
        runs.append((actual, stock, truth(plain, x)))
    pairs.assert_near_enough(runs)
    (report,) = [r for r in explain(fused).layers if r.is_adapter]
    assert (report.path, report.reason) == ("fused:torch", "")
    assert report.method == ("DoRA" if dora else "LoRA")


@pytest.mark.parametrize("base", ["nf4", "int8", "int8, threshold"])
def test_under_autocast_a_step_is_fused_and_as_near_to_float64_as_pefts(base):
    runs = []
    for seed in range(4):
        plain, fused = pair(base)
        x = torch.randn(17, K, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.bfloat16):
            with fused_calls() as calls:
                actual = step(fused, x)
            stock = step(plain, x)
            (report,) = [r for r in explain(fused).layers if r.is_adapter]
        assert calls["nf4_linear"] + calls["int8_linear"] == 1
        assert (report.path, report.reason) == ("fused:torch", "")
        runs.append((actual, stock, truth(plain, x)))
    pairs.assert_near_enough(runs, torch.bfloat16)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_dropout_merging_disabling_and_several_steps(base):
    plain, fused = pair(base, lora_dropout=0.4)
    x = draw()
    (dropped,) = {step(fused, x)["y"].sum().item()}
    with torch.no_grad():
        assert fused(x).sum().item() != dropped, "another mask"
        for model in (plain, fused):
            model.base_model.model.proj.lora_dropout.eval()
        torch.testing.assert_close(fused(x), plain(x))
        with plain.disable_adapter(), fused.disable_adapter():
            assert torch.equal(fused(x), plain(x))
    for action in ("merge_adapter", "unmerge_adapter"):
        for model in (plain, fused):
            with pytest.warns(UserWarning, match="may get different generations"):
                getattr(model, action)()
        torch.testing.assert_close(fused(x), plain(x))


def test_dora_with_dropout_is_pefts():
    plain, fused = pair("nf4", lora_dropout=0.4, use_dora=True)
    results = []
    for model in (fused, plain):
        torch.manual_seed(3)
        results.append(step(model, draw()))
    pairs.assert_close(*results, 1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_compute_dtype_of_its_own(dora):
    """As transformers sets it: float32 activations, of which the frozen product alone is computed in bfloat16."""
    plain, fused = pair((four_bit(compute=torch.bfloat16), 4), use_dora=dora)
    actual, stock, exact = step(fused, draw()), step(plain, draw()), truth(plain, draw())
    for name, value in actual.items():
        assert value.dtype is stock[name].dtype is torch.float32
        off, stocks = (
            (t.double() - exact[name]).norm() / exact[name].norm() for t in (value, stock[name])
        )
        assert off <= 1.2 * stocks + 1e-5, name
    with torch.autocast("cpu", torch.bfloat16):
        rounded = step(fused, draw())
    for name, value in rounded.items():
        assert value.dtype is torch.float32
        # a few roundings of independent elements to bfloat16, each at most half of this
        off = (value.double() - exact[name]).norm() / exact[name].norm()
        assert off <= torch.finfo(torch.bfloat16).eps, name


REASONS = {
    "stored as fp4": lambda: ((four_bit(quant_type="fp4"), 4), lambda layer: None),
    "repacked by bitsandbytes": lambda: (
        "nf4",
        lambda layer: setattr(layer.weight.quant_state, "packing_format_for_cpu", True),
    ),
    "a code table other than that of nf4": lambda: (
        "nf4",
        lambda layer: layer.weight.quant_state.code.mul_(0.5),
    ),
    "not quantised yet": lambda: (
        (filled(bnb.nn.Linear4bit(K, N, quant_type="nf4")), 4),
        lambda layer: None,
    ),
    "also quantises the activations in evaluation": lambda: ("int8", lambda layer: layer.eval()),
    "its base layer is trained": lambda: ("nf4", lambda layer: layer.bias.requires_grad_()),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_read_runs_pefts_forward_and_says_why(reason):
    base, change = REASONS[reason]()
    _, fused = pair(base)
    change(fused.base_model.model.proj.base_layer)
    accelerate(fused)
    (report,) = [r for r in explain(fused).layers if r.is_adapter]
    assert report.path == "peft"
    assert reason in report.reason
    if "not quantised" not in reason and "repacked" not in reason:
        with fused_calls() as calls:
            fused(draw())
        assert not calls["nf4_linear"] + calls["int8_linear"]


def test_a_copy_of_a_fused_layer_is_whole():
    _, fused = pair("nf4")
    twin = copy.deepcopy(fused)
    assert isinstance(twin.base_model.model.proj, FusedLinear4bit)
    assert torch.equal(twin(draw()), fused(draw()))
