"""Which gated MLPs are fused, and that each gives the results of its own forward."""

import models
import pairs
import pytest
import torch
from fused_pairs import adapt, draw
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5GemmaModuleConfig
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaMLP

from peftkit import accelerate, explain
from peftkit.fuse import mlp
from peftkit.fuse.mlp import FusedGatedMLP, fuse_gated_mlps, share_buffer
from peftkit_kernels.core.views import as_one_view

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


class MLP(nn.Module):
    """A gated MLP; subclasses change one thing."""

    def __init__(self, act=None, width=WIDTH):
        super().__init__()
        self.act_fn = act or nn.SiLU()
        self.gate_proj, self.up_proj = nn.Linear(width, 24), nn.Linear(width, 24)
        self.down_proj = nn.Linear(24, width)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def calls(monkeypatch):
    with pairs.counted(monkeypatch) as counts:
        yield counts


@pytest.mark.parametrize(
    "act",
    [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), SiLUActivation(), GELUActivation(), GELUTanh()],
    ids=repr,
)
@pytest.mark.parametrize("targets", [None, ["up_proj"], ["gate_proj", "down_proj"]], ids=str)
def test_gated_mlps_are_one_call(act, targets, calls):
    plain, fused = adapt(MLP(act), targets)
    x = draw(3, 5, WIDTH)
    calls.clear()  # recognition has called it too
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert calls == {"lora_swiglu_mlp": 1, "peft": len(targets or "123")}


class WithDropout(MLP):
    """Drops hidden values in training."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(hidden, self.p, self.training))


class Scaled(MLP):
    """Multiplies by something that no known formula has."""

    def forward(self, x):
        return super().forward(x) * 1.01


class Swapped(MLP):
    """Gate and up swapped."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Clamped(MLP):
    """As in some mixture-of-experts models."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=0.5), self.up_proj(x).clamp(-0.5, 0.5)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(
    "module",
    [MLP(nn.ReLU()), MLP(nn.Tanh()), WithDropout(0.1), Scaled(), Swapped(), Clamped()],
    ids=lambda module: type(module).__name__ + type(module.act_fn).__name__,
)
def test_another_formula_is_not_fused(module):
    plain, fused = adapt(module)
    assert not isinstance(fused.base_model.model[0], FusedGatedMLP)
    x = draw(3, 5, WIDTH)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_transformers_mlp_with_dropout_of_its_own(rate):
    config = T5GemmaModuleConfig(hidden_size=WIDTH, intermediate_size=24, dropout_rate=rate)
    config.dropout_rate = rate
    _, fused = adapt(T5GemmaMLP(config))
    assert isinstance(fused.base_model.model[0], FusedGatedMLP) == (rate == 0.0)


def test_recognition_keeps_modes_and_generators():
    module = MLP()
    module.act_fn.eval()
    module = nn.ModuleList([module, MLP().eval(), WithDropout(0.5)]).requires_grad_(False)
    module[0].up_proj.eval()
    modes = [part.training for part in module.modules()]
    state = torch.get_rng_state()
    assert fuse_gated_mlps(module) == 2
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_one_mlp_with_a_hook_inside_runs_its_own_forward():
    module = nn.ModuleList([MLP(), MLP()]).requires_grad_(False)
    hook = module[0].up_proj.register_forward_hook(lambda *args: None)
    assert fuse_gated_mlps(module) == 2
    assert module[0].peftkit_verdict() == ("peft", "up_proj: it has hooks")
    assert module[1].peftkit_verdict() == ("fused:torch", "")
    hook.remove()
    assert module[0].peftkit_verdict() == ("fused:torch", "")


def test_an_mlp_with_other_arguments_runs_its_own_forward():
    class TwoArguments(MLP):
        def forward(self, x, residual=None):
            y = super().forward(x)
            return y if residual is None else y + residual

    plain, fused = (model.base_model.model[0] for model in adapt(TwoArguments()))
    assert isinstance(fused, FusedGatedMLP)
    x = draw(3, WIDTH)
    torch.testing.assert_close(fused(x, residual=x), plain(x, residual=x))
    torch.testing.assert_close(fused(x=x), plain(x=x))


def test_a_joint_projection_with_dropout_runs_its_own_forward(monkeypatch):
    plain, fused = pairs.pair("phi3", torch.float64, lora_dropout=0.3)
    batch = pairs.inputs("phi3", torch.float64)
    with pairs.counted(monkeypatch) as calls:
        pairs.step(fused, batch)
    assert calls["lora_swiglu_mlp"] == 0
    assert calls["lora_linear"] == 8
    with pairs.counted(monkeypatch) as calls, torch.no_grad():
        actual = fused.eval()(**batch).logits
    assert calls["lora_swiglu_mlp"] == 2
    torch.testing.assert_close(actual, plain.eval()(**batch).logits, rtol=1e-10, atol=1e-10)


def test_on_one_gpu_gate_and_up_share_a_buffer_with_the_same_bits(monkeypatch, tmp_path):
    base = models.tiny("llama")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = accelerate(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    batch = models.batch("llama")
    expected = model(**batch).loss
    mlps = [m for m in base.modules() if isinstance(m, FusedGatedMLP)]
    weights = [[m.gate_proj.base_layer.weight, m.up_proj.base_layer.weight] for m in mlps]
    assert [as_one_view(pair, 0) for pair in weights] == [None, None], (
        "on the CPU they are not moved"
    )
    monkeypatch.setattr(mlp, "_may_move_weights", lambda x: True)
    places = []
    for _ in range(2):
        assert torch.equal(model(**batch).loss, expected)
        whole = [as_one_view(pair, 0) for pair in weights]
        assert [w.shape for w in whole] == [(2 * len(pair[0]), 32) for pair in weights]
        places.append([w.data_ptr() for w in whole])
    assert places[0] == places[1], "moved only once"
    assert all(p.grad is None and not p.requires_grad for pair in weights for p in pair)
    model.unload().save_pretrained(tmp_path)
    pairs.assert_equal(type(base).from_pretrained(tmp_path).state_dict(), state)


def test_weights_that_differ_or_are_views_are_not_moved():
    def weight(*shape, dtype=torch.float32):
        return nn.Parameter(torch.ones(*shape, dtype=dtype), requires_grad=False)

    buffer = torch.zeros(8, 4)
    part = nn.Parameter(buffer[1:4], requires_grad=False)
    for other in (part, weight(3, 4, dtype=torch.bfloat16), weight(3, 5), weight(3, 4).data):
        first = weight(3, 4)
        places = first.data_ptr(), other.data_ptr()
        share_buffer([first, other])
        assert (first.data_ptr(), other.data_ptr()) == places
    first, second = weight(3, 4), weight(2, 4)
    with torch.inference_mode():
        share_buffer([first, second])
    assert as_one_view([first, second], 0).shape == (5, 4)
    assert not first.is_inference(), "the weights can still be trained"
    assert (torch.ones(1, 4, requires_grad=True) @ first.T).sum().requires_grad


def test_blocks_are_explained():
    _, fused = pairs.pair("llama")
    blocks = explain(fused).blocks
    assert blocks["gated MLP"] == 2
    assert blocks["frozen RMSNorm"] == 5
    fused.base_model.set_adapter([])
    report = {layer.reason for layer in explain(fused).layers if layer.method == "gated MLP"}
    assert len(report) == 1
    assert "gate_proj: no active adapter has weights in it" in report.pop()
