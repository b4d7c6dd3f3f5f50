"""Recognition of gated MLPs: every way to write the formula is recognised, and no near miss is."""

import copy

import mlp_formulas
import pytest
import torch
from mlp_formulas import OTHER_ACTIVATIONS, STYLES, names_of
from mlp_near_misses import NEAR_MISSES
from torch import nn
from transformers import FalconH1Config, LlamaConfig
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise import recognise_gated_mlp, verdict

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def forgotten(monkeypatch):
    """Clear the cache of recognised kinds."""
    monkeypatch.setattr(verdict, "_seals", {})


def recognised(module):
    return recognise_gated_mlp(module, names_of(module))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STYLES)
def test_styles_of_the_formula_are_one(name, dtype):
    assert recognised(copy.deepcopy(STYLES[name]).to(dtype)) == "silu"


@pytest.mark.parametrize(
    ("name", "act"),
    [(name, act) for name, acts in mlp_formulas.ACTIVATIONS.items() for act in acts],
)
def test_activations_with_a_fused_form(name, act):
    assert recognised(mlp_formulas.MLP(act)) == name
    assert recognised(mlp_formulas.JointMLP(act)) == name


@pytest.mark.parametrize("name", OTHER_ACTIVATIONS)
def test_other_activations_are_refused(name):
    assert isinstance(recognised(mlp_formulas.MLP(OTHER_ACTIVATIONS[name])), Reason)


def test_the_reason_names_the_activation():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="relu")
    assert recognised(LlamaMLP(config)) == "its activation (ReLU) has no fused form"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused(name, dtype):
    found = recognised(copy.deepcopy(NEAR_MISSES[name]).to(dtype))
    assert isinstance(found, Reason)
    assert len(found) > 10


def test_there_are_enough_near_misses():
    assert len(NEAR_MISSES) + len(OTHER_ACTIVATIONS) > 60


@pytest.mark.parametrize("multipliers", [(1.0, 1.0), (1.0, 0.9), (0.95, 1.0), (1.001, 1.0)])
def test_multipliers_of_a_family(multipliers):
    config = FalconH1Config(hidden_size=32, intermediate_size=48, mlp_multipliers=[*multipliers])
    found = recognised(FalconH1MLP(config))
    assert (found == "silu") == (multipliers == (1.0, 1.0))


def test_limits_of_a_family():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}
    assert "clamp" in recognised(DeepseekV4MLP(DeepseekV4Config(**sizes)))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_values_dtype_and_device_do_not_matter(device, forgotten):
    assert recognised(mlp_formulas.MLP(nn.GELU()).to(device, torch.bfloat16)) == "gelu"


def test_children_that_are_not_linears():
    module = mlp_formulas.MLP()
    module.up_proj = nn.Identity()
    assert recognised(module) == "its up_proj is no linear layer"
    del module.up_proj
    assert recognised(module) == "its up_proj is no linear layer"


@pytest.mark.parametrize(
    "hook",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_of_the_activation_are_refused_and_not_run(hook):
    module, ran = mlp_formulas.MLP(), []
    handle = getattr(module.act_fn, hook)(lambda *_: ran.append(1))
    assert recognised(module) == "its act_fn has hooks"
    handle.remove()
    assert recognised(module) == "silu"
    getattr(module, hook)(lambda *_: ran.append(1))
    for child in (module.gate_proj, module.down_proj):
        getattr(child, hook)(lambda *_: ran.append(1))
    assert recognised(module) == "silu", "the caller of the linears checks their hooks"
    assert not ran


def test_an_activation_with_a_forward_of_its_own():
    module = mlp_formulas.MLP()
    module.act_fn.forward = torch.relu
    assert recognised(module) == "its act_fn has a forward of its own"


def test_recognition_leaves_everything_as_it_was(forgotten):
    for name in ("dropout", "random", "dropout_module", "changes_its_input"):
        module = copy.deepcopy(NEAR_MISSES[name]).eval()
        module.up_proj.train()
        modes = [part.training for part in module.modules()]
        before = {n: (id(v), v.clone()) for n, v in module.state_dict().items()}
        generator = torch.get_rng_state()
        with torch.no_grad():
            recognised(module)
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), generator)
        assert [part.training for part in module.modules()] == modes
        assert all(torch.equal(v, before[n][1]) for n, v in module.state_dict().items())
        assert {type(part) for part in module.modules()} <= {
            type(module),
            *(nn.Linear, nn.SiLU, nn.Dropout),
        }
