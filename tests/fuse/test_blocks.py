"""Linears that share an input, and gated MLPs: what is grouped and fused, what is not, and that nothing stale is used."""

import models
import pairs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5GemmaModuleConfig
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaMLP

from peftkit import accelerate, explain
from peftkit.fuse import mlp
from peftkit.fuse.mlp import FusedGatedMLP, fuse_gated_mlps, share_buffer
from peftkit.fuse.siblings import GROUP, Siblings, group_siblings
from peftkit.fuse.linear import fuse_layer
from peftkit_kernels.joined import joined

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


class Attention(nn.Module):
    """Three projections under names of one's choice."""

    def __init__(self, names=("q_proj", "k_proj", "v_proj"), inputs=(WIDTH,) * 3):
        super().__init__()
        for i, (name, size) in enumerate(zip(names, inputs, strict=True)):
            self.add_module(name, nn.Linear(size, 8 * (i + 1)))


class MLP(nn.Module):
    """A gated MLP; subclasses change one thing."""

    def __init__(self, act=None, width=WIDTH):
        super().__init__()
        self.act_fn = act or nn.SiLU()
        self.gate_proj, self.up_proj = nn.Linear(width, 24), nn.Linear(width, 24)
        self.down_proj = nn.Linear(24, width)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def adapt(module, targets=None, **config):
    """``module`` in float64 with LoRA on its linears, and a fused twin."""
    module = nn.Sequential(module).double()
    names = targets or [n.split(".")[-1] for n, m in module.named_modules() if type(m) is nn.Linear]
    plain = get_peft_model(module, LoraConfig(r=4, target_modules=names, **config))
    pairs.fill_factors(plain)
    return plain, accelerate(pairs.copy.deepcopy(plain))


def attention(**options):
    """The projections of a stock attention and of its fused twin."""
    return (model.base_model.model[0] for model in adapt(Attention(**options)))


def call(module, x, names):
    return [getattr(module, name)(x) for name in names]


@pytest.fixture
def calls(monkeypatch):
    with pairs.counted(monkeypatch) as counts:
        yield counts


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q_lin", "k_lin", "v_lin"),
        ("q", "k", "v"),
    ],
    ids=lambda names: names[0],
)
def test_siblings_with_known_names_are_one_call(names, calls):
    plain, fused = attention(names=names)
    x = draw(2, 5, WIDTH)
    for actual, expected in zip(call(fused, x, names), call(plain, x, names), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert calls == {"LoRAQKV": 1, "peft": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [12, 13], ids=["apart", "joined"])
def test_forwards_with_and_without_gradients_give_the_same_bits(tokens, dropout, calls):
    """As reentrant checkpointing needs it; where no product is shared the linears compute for themselves."""
    names = ("q_proj", "k_proj", "v_proj")
    _, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=dropout))
    fused.train()
    x = draw(1, tokens, WIDTH)
    torch.manual_seed(0)
    expected = call(fused, x, names)
    torch.manual_seed(0)
    with torch.no_grad():
        for actual, one in zip(call(fused, x, names), expected, strict=True):
            assert torch.equal(actual, one)
    apart = tokens == 12 and dropout == 0.0
    assert calls == ({"LoRAQKV": 1, "LoRALinear": 3} if apart else {"LoRAQKV": 2})


def test_siblings_of_different_input_size_and_single_ones_are_not_grouped():
    groups = []
    for options in ({}, {"inputs": (WIDTH, 16, 16)}, {"names": ("q_proj", "b", "c")}):
        plain, _ = adapt(Attention(**options))
        for module in plain.modules():
            fuse_layer(module)
        groups.append(group_siblings(plain))
    assert groups == [1, 0, 0]


def test_cross_attention_keeps_what_is_shared(calls):
    """The query comes with the decoder's states, keys and values with the encoder's."""
    plain, fused = attention()
    for forward in range(3):
        x, states = draw(2, 5, WIDTH), draw(2, 7, WIDTH)
        for name, source in (("q_proj", x), ("k_proj", states), ("v_proj", states)):
            expected = getattr(plain, name)(source)
            actual = getattr(fused, name)(source)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        del calls["peft"]
        # the first query still computed keys and values of its own input, in vain
        expected_calls = {"LoRAQKV": 2 + forward, "LoRALinear": forward}
        assert calls == {name: count for name, count in expected_calls.items() if count}


def test_any_order_and_subset_of_calls_is_exact():
    plain, fused = attention()
    names = ("q_proj", "k_proj", "v_proj")
    generator = torch.Generator().manual_seed(0)
    inputs = [draw(2, 3, WIDTH) for _ in range(2)]
    for pick in torch.randint(0, 6, (80,), generator=generator).tolist():
        name, x = names[pick % 3], inputs[pick // 3]
        expected = getattr(plain, name)(x)
        torch.testing.assert_close(getattr(fused, name)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_noticed(mode):
    plain, fused = attention()
    with mode():
        x = draw(2, 16, WIDTH)
        fused.q_proj(x)
        x.mul_(2.0)
        torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x), rtol=1e-12, atol=1e-12)


def changes():
    """What may happen between the query and the key, by name."""

    def optimiser_step(module):
        with torch.no_grad():
            module.k_proj.lora_B["default"].weight.add_(1.0)

    def other_adapter(module):
        module.k_proj.update_layer("two", 2, lora_alpha=9, config=LoraConfig())
        pairs.fill_factors(module, seed=3)
        module.k_proj.set_adapter("two")

    def evaluation(module):
        module.k_proj.eval()

    return {
        "optimiser_step": optimiser_step,
        "other_adapter": other_adapter,
        "scale": lambda module: module.k_proj.set_scale("default", 5.0),
        "disabled": lambda module: module.k_proj.enable_adapters(False),
        "merged": lambda module: module.k_proj.merge(),
        "new_weight": lambda module: setattr(
            module.k_proj.lora_A["default"], "weight", nn.Parameter(torch.ones(4, WIDTH).double())
        ),
        "evaluation": evaluation,
    }


@pytest.mark.parametrize("change", changes())
def test_an_output_computed_before_a_change_is_not_handed_out(change):
    plain, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=0.0))
    x = draw(2, 5, WIDTH)
    fused.q_proj(x)
    for module in (plain, fused):
        changes()[change](module)
    torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x), rtol=1e-12, atol=1e-12)


def test_dropout_switched_off_after_the_query():
    plain, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=0.5))
    x = draw(2, 5, WIDTH)
    fused.train().q_proj(x)
    torch.testing.assert_close(fused.eval().k_proj(x), plain.eval().k_proj(x))


def test_gradients_and_no_gradients_are_kept_apart():
    _, fused = attention()
    x = draw(2, 16, WIDTH)
    with torch.no_grad():
        fused.q_proj(x)
    assert fused.k_proj(x).requires_grad


def test_nothing_is_held_once_all_outputs_are_taken():
    _, fused = attention()
    call(fused, draw(2, 5, WIDTH), ("q_proj", "k_proj", "v_proj"))
    group = fused.q_proj._peftkit_siblings
    assert isinstance(group, Siblings)
    assert group is fused.v_proj._peftkit_siblings
    assert group._input is None
    assert not group._outputs


@pytest.mark.parametrize(
    "act",
    [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), SiLUActivation(), GELUActivation(), GELUTanh()],
    ids=repr,
)
@pytest.mark.parametrize("targets", [None, ["up_proj"], ["gate_proj", "down_proj"]], ids=str)
def test_gated_mlps_are_one_call(act, targets, calls):
    plain, fused = adapt(MLP(act), targets)
    x = draw(3, 5, WIDTH)
    calls.clear()  # finding the formula has called it too
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert calls == {"LoRASwiGLUMLP": 1, "peft": len(targets or "123")}


class WithDropout(MLP):
    """Drops hidden values in training."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(hidden, self.p, self.training))


class Scaled(MLP):
    """Multiplies by something that is no formula of ours."""

    def forward(self, x):
        return super().forward(x) * 1.01


class Swapped(MLP):
    """Gate and up the other way round."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Clamped(MLP):
    """Like some mixture-of-experts models."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=0.5), self.up_proj(x).clamp(-0.5, 0.5)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(
    "module",
    [MLP(nn.ReLU()), MLP(nn.Tanh()), WithDropout(0.1), Scaled(), Swapped(), Clamped()],
    ids=lambda module: type(module).__name__ + type(module.act_fn).__name__,
)
def test_another_formula_is_left_alone(module):
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


def test_finding_the_formula_leaves_modes_and_generators_alone():
    module = MLP()
    module.act_fn.eval()
    module = nn.ModuleList([module, MLP().eval(), WithDropout(0.5)]).requires_grad_(False)
    module[0].up_proj.eval()
    modes = [part.training for part in module.modules()]
    state = torch.get_rng_state()
    assert fuse_gated_mlps(module) == 2
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_one_mlp_that_cannot_be_computed_does_not_speak_for_the_others():
    module = nn.ModuleList([MLP(), MLP()]).requires_grad_(False)
    module[0].up_proj.register_forward_hook(lambda *args: None)
    assert fuse_gated_mlps(module) == 1
    assert isinstance(module[1], FusedGatedMLP)


def test_an_mlp_called_otherwise_runs_its_own_forward():
    class TwoArguments(MLP):
        def forward(self, x, residual=None):
            return super().forward(x) + (0.0 if residual is None else residual)

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
    assert calls["LoRASwiGLUMLP"] == 0
    assert calls["LoRALinear"] == 8
    with pairs.counted(monkeypatch) as calls, torch.no_grad():
        actual = fused.eval()(**batch).logits
    assert calls["LoRASwiGLUMLP"] == 2
    torch.testing.assert_close(actual, plain.eval()(**batch).logits, rtol=1e-10, atol=1e-10)


def test_on_one_gpu_gate_and_up_are_brought_together_without_changing_a_bit(monkeypatch, tmp_path):
    base = models.tiny("llama")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = accelerate(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    batch = models.batch("llama")
    expected = model(**batch).loss
    mlps = [m for m in base.modules() if isinstance(m, FusedGatedMLP)]
    weights = [[m.gate_proj.base_layer.weight, m.up_proj.base_layer.weight] for m in mlps]
    assert [joined(pair, 0) for pair in weights] == [None, None], "on the CPU they stay as they are"
    monkeypatch.setattr(mlp, "_may_move_weights", lambda x: True)
    places = []
    for _ in range(2):
        assert torch.equal(model(**batch).loss, expected)
        whole = [joined(pair, 0) for pair in weights]
        assert [w.shape for w in whole] == [(2 * len(pair[0]), 32) for pair in weights]
        places.append([w.data_ptr() for w in whole])
    assert places[0] == places[1], "moved once"
    assert all(p.grad is None and not p.requires_grad for pair in weights for p in pair)
    model.unload().save_pretrained(tmp_path)
    pairs.assert_equal(type(base).from_pretrained(tmp_path).state_dict(), state)


def test_weights_that_are_not_alone_or_not_alike_stay_where_they_are():
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
    assert joined([first, second], 0).shape == (5, 4)
    assert not first.is_inference(), "training may follow"
    assert (torch.ones(1, 4, requires_grad=True) @ first.T).sum().requires_grad


def test_blocks_are_explained():
    _, fused = pairs.pair("llama")
    blocks = explain(fused).blocks
    assert blocks["gated MLP"] == 2
    assert blocks["frozen RMSNorm"] == 5
    fused.base_model.set_adapter([])
    report = {layer.reason for layer in explain(fused).layers if layer.method == "gated MLP"}
    assert len(report) == 1
    assert "gate_proj: 0 adapters are active" in report.pop()


def test_names_of_every_tiny_model_are_grouped_or_known():
    found = {}
    for name in models.NAMES:
        _, fused = pairs.pair(name)
        groups = {id(m._peftkit_siblings) for m in fused.modules() if hasattr(m, "_peftkit_siblings")}
        found[name] = (len(groups), sum(isinstance(m, FusedGatedMLP) for m in fused.modules()))
    four = dict.fromkeys(("llama", "qwen3", "gemma3", "mistral"), (2, 2))
    rest = {
        "gpt2": (0, 0),
        "opt": (2, 0),
        "phi3": (0, 2),
        "bert": (2, 0),
        "t5": (6, 0),
        "vit": (2, 0),
    }
    assert found == four | rest


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_groups_leave_the_query_out_before_the_first_forward(name):
    """Under checkpointing the recomputation of the first forward has to save what that forward saved."""
    import families

    model = accelerate(
        get_peft_model(families.family(name), LoraConfig(r=4, target_modules="all-linear"))
    ).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    groups = {
        n: [
            len(m.__dict__["_peftkit_siblings"].members)
            for m in attention.children()
            if "_peftkit_siblings" in vars(m)
        ]
        for n, attention in model.named_modules()
        if n.endswith(("EncDecAttention", "encoder_attn"))
    }
    assert groups
    assert all(sizes == [2, 2] for sizes in groups.values())
