"""A seal is broken by every change that could change the result. It names the change, and is valid again if the change is undone."""

import copy
import functools
import pickle
import timeit

import mlp_formulas
import pytest
import torch
import torch.nn.functional as F
from mlp_formulas import NAMES, mlp
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.activations import GELUTanh
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise import seal_gated_mlp, seal_norm

SIZES = {"hidden_size": 32, "intermediate_size": 48}


def llama(act="silu"):
    module = LlamaMLP(LlamaConfig(hidden_act=act, **SIZES))
    return module, seal_gated_mlp(module, NAMES)


def zero(*args, **kwargs):
    return args[-1] * 0.0


def changes():
    """Changes of Llama's MLP and of the functions that it calls: object, name, value and a part of the reason."""
    return {
        "act_fn.forward": (lambda m: m.act_fn, "forward", zero, "act_fn has a forward of its own"),
        "class_forward": (lambda m: LlamaMLP, "forward", zero, "LlamaMLP.forward was replaced"),
        "class_of_act": (
            lambda m: type(m.act_fn),
            "forward",
            zero,
            "SiLUActivation.forward was replaced",
        ),
        "silu": (lambda m: F, "silu", zero, "torch.nn.functional.silu was replaced"),
        "linear": (lambda m: F, "linear", zero, "torch.nn.functional.linear was replaced"),
        "Linear": (lambda m: nn.Linear, "forward", zero, "Linear.forward was replaced"),
        "call": (lambda m: nn.Module, "__call__", zero, "Module.__call__ was replaced"),
        "functional": (lambda m: nn, "functional", F.silu, "torch.nn.functional was replaced"),
    }


@pytest.mark.parametrize("name", changes())
def test_a_change_is_named_and_can_be_undone(name, monkeypatch):
    module, seal = llama()
    assert seal.broken(module) is None
    owner, attribute, value, reason = changes()[name]
    with monkeypatch.context() as patched:
        patched.setattr(owner(module), attribute, value)
        broken = seal.broken(module)
    assert isinstance(broken, Reason)
    assert reason in broken
    vars(module.act_fn).pop("forward", None)
    assert seal.broken(module) is None
    assert seal_gated_mlp(module, NAMES) is seal


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity(), None], ids=repr)
def test_another_activation(act):
    module, seal = llama()
    own = module.act_fn
    module.act_fn = act
    assert "its act_fn was a SiLUActivation and is now" in seal.broken(module)
    module.act_fn = copy.deepcopy(own)
    assert seal.broken(module) is None, "it is the same activation function"


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(register):
    module, seal = llama()
    handle = getattr(module.act_fn, register)(lambda *_: None)
    assert seal.broken(module) == "its act_fn has hooks"
    handle.remove()
    handle = getattr(module, register)(lambda *_: None)
    assert seal.broken(module) is None, "the module's own hooks run around the fused forward"
    handle.remove()
    everywhere = register.replace("register_", "register_module_")
    handle = getattr(nn.modules.module, everywhere)(lambda *_: None)
    assert seal.broken(module) == "hooks on all modules are registered"
    handle.remove()
    assert seal.broken(module) is None


def test_settings_of_the_module():
    norm = LlamaRMSNorm(16, eps=1e-6)
    seal = seal_norm(norm)
    for value in (1e-5, torch.tensor(1e-6), torch.ones(3), None, "1e-6", (torch.ones(2),)):
        norm.variance_epsilon = value
        assert "its variance_epsilon was 1e-06 when it was fused and is now" in seal.broken(norm)
    del norm.variance_epsilon
    assert "is now missing" in seal.broken(norm)
    norm.variance_epsilon = 1e-6
    norm.unrelated = 3
    assert seal.broken(norm) is None
    norm.forward = zero
    assert seal.broken(norm) is None, "the forward of such a module is not the fused one"


def test_settings_of_the_activation():
    module = GemmaMLP(GemmaConfig(hidden_act="gelu_pytorch_tanh", **SIZES))
    seal = seal_gated_mlp(module, NAMES)
    assert type(module.act_fn) is GELUTanh
    module.act_fn.act = functools.partial(F.gelu, approximate="tanh")
    assert seal.broken(module) is None
    module.act_fn.act = functools.partial(F.gelu, approximate="none")
    assert "its act_fn.act was" in seal.broken(module)


def test_a_dropout_that_is_switched_on():
    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.dropout(hidden))

    module = mlp(forward)
    module.dropout = nn.Dropout(0.0)
    seal = seal_gated_mlp(module, NAMES)
    assert seal.answer == "silu"
    module.dropout.p = 0.1
    assert seal.broken(module) == "its dropout.p was 0.0 when it was fused and is now 0.1"


def test_helpers_properties_and_names_of_a_file():
    class Scaled(mlp_formulas.MLP):
        factor = 1.0

        def hidden(self, x):
            return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

        @property
        def scale(self):
            return self.factor

        def forward(self, x):
            return self.down_proj(self.hidden(x)) * self.scale

    class Below(Scaled):
        pass

    module = Below()
    seal = seal_gated_mlp(module, NAMES)
    assert (seal.answer, seal.broken(module)) == ("silu", None)
    module.hidden = zero
    assert seal.broken(module) == "it has a hidden of its own"
    del module.hidden
    for owner, name in (
        (Scaled, "hidden"),
        (Below, "hidden"),
        (Scaled, "scale"),
        (Below, "factor"),
    ):
        before = vars(owner).get(name)
        setattr(owner, name, 2.0)
        assert f"{name} was replaced" in seal.broken(module)
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)
        assert seal.broken(module) is None


def test_a_name_in_the_file_of_the_class(monkeypatch):
    norm = LlamaRMSNorm(16)
    seal = seal_norm(norm)
    monkeypatch.setattr(modeling_llama, "torch", F)
    assert seal.broken(norm) == "transformers.models.llama.modeling_llama.torch was replaced"


def test_copies_and_pickles():
    module, seal = llama("gelu_pytorch_tanh")
    twin, twin_seal = copy.deepcopy((module, seal))
    assert twin_seal is seal
    assert seal.broken(twin) is None
    loaded, loaded_seal = pickle.loads(pickle.dumps((module, seal)))
    assert loaded_seal.answer == "gelu_tanh"
    assert loaded_seal.broken(loaded) is None
    loaded.act_fn = nn.ReLU()
    assert "act_fn" in loaded_seal.broken(loaded)
    assert seal.broken(module) is None


def test_a_pickle_of_another_formula_is_broken(monkeypatch):
    norm = LlamaRMSNorm(16)
    stored = pickle.dumps((norm, seal_norm(norm)))
    loaded, seal = pickle.loads(stored)
    loaded.variance_epsilon = 0.5
    assert seal.broken(loaded) == "its formula changed since it was saved"
    loaded.variance_epsilon = 1e-6
    assert seal.broken(loaded) is None
    loaded, seal = pickle.loads(stored)
    monkeypatch.setattr(LlamaRMSNorm, "forward", zero)
    assert isinstance(seal.broken(loaded), Reason)


@pytest.mark.parametrize("kind", ["LlamaRMSNorm", "LayerNorm", "LlamaMLP", "GemmaMLP"])
def test_comparing_takes_less_than_a_microsecond(kind):
    """The limit is a multiple of the time of a call that looks up one key (about 50 nanoseconds), so that a busy machine does not matter."""
    make = {
        "LlamaRMSNorm": lambda: LlamaRMSNorm(16),
        "LayerNorm": lambda: nn.LayerNorm(16),
        "LlamaMLP": lambda: llama()[0],
        "GemmaMLP": lambda: GemmaMLP(GemmaConfig(**SIZES)),
    }[kind]
    other, module = make(), make()
    seal = seal_gated_mlp(other, NAMES) if kind.endswith("MLP") else seal_norm(other)
    assert seal.broken(module) is None
    table = {"a": 1}

    def best(function):
        return min(timeit.repeat(function, number=50, repeat=2000))

    assert best(lambda: seal.broken(module)) < 20 * best(lambda: table["a"])
