"""Recognition of norms: every way to write a known formula is recognised, and no near miss is."""

import copy
import random

import norm_formulas
import pytest
import torch
from causal import AllDouble
from norm_formulas import WIDTH, Norm, norm
from norm_near_misses import NEAR_MISSES, OTHER_CASTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftkit.fuse import recognise
from peftkit.fuse.norm import FusedNorm, fuse_norms
from peftkit.fuse.plan import Reason, declined
from peftkit.fuse.recognise import NormFormula, recognise_norm, verdict

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def forgotten(monkeypatch):
    """Clear the cache of recognised kinds."""
    monkeypatch.setattr(verdict, "_seals", {})


def rms_styles():
    return [
        pytest.param(*formula, forward, id=forward.__name__)
        for formula, forwards in norm_formulas.RMS.items()
        for forward in forwards
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "round_first", "forward"), rms_styles())
def test_styles_of_rms_norm_are_one_formula(offset, round_first, forward, dtype):
    found = recognise_norm(norm(forward, eps=3e-4).to(dtype))
    assert found[:4] == ("rms", 3e-4, offset, round_first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bias", "forward"),
    [(bias, f) for bias, forwards in norm_formulas.LAYER.items() for f in forwards],
)
def test_styles_of_layer_norm_are_one_formula(bias, forward, dtype):
    found = recognise_norm(norm(forward, eps=3e-4, bias=bias).to(dtype))
    assert found[:2] == ("layer", 3e-4)
    assert found.has_bias == bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_not_fused(name, dtype):
    module = copy.deepcopy(NEAR_MISSES[name]).to(dtype)
    assert isinstance(recognise_norm(module), Reason)
    assert fuse_norms(nn.Sequential(module)) == 0
    assert not isinstance(module, FusedNorm)
    method, reason = declined(module)
    assert method == "frozen norm"
    assert len(reason) > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHER_CASTS)
def test_another_order_of_casts_is_fused_only_in_dtypes_without_casts(name, dtype):
    module = copy.deepcopy(OTHER_CASTS[name]).to(dtype)
    twin = copy.deepcopy(module)
    assert fuse_norms(nn.Sequential(module)) == (dtype is torch.float32)
    if dtype is not torch.float32:
        assert "casts in another order" in declined(module)[1]
        return
    x = 100 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), twin(x), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    module.bfloat16(), twin.bfloat16()
    assert "casts in another order" in module.peftkit_verdict()[1]
    assert torch.equal(module(x.bfloat16()), twin(x.bfloat16()))


def test_there_are_enough_near_misses():
    assert len(NEAR_MISSES) + len(OTHER_CASTS) > 60


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0000001e-5, 0.5, 1e6])
def test_eps_is_read_from_the_graph(eps):
    """The name of the attribute does not matter."""

    class OwnNorm(Norm):
        def _norm(self, h):
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.tiny_number)

    assert recognise_norm(OwnNorm(tiny_number=eps)).eps == eps


def test_an_eps_that_is_a_parameter_is_refused():
    class OwnNorm(Norm):
        def __init__(self):
            super().__init__()
            self.eps = nn.Parameter(torch.tensor(1e-6), requires_grad=False)

    assert "besides its weight" in recognise_norm(OwnNorm())


def test_a_subclass_that_changes_a_helper_is_another_kind():
    class HalfNorm(Norm):
        def _norm(self, h):
            return super()._norm(h) * 0.5

    assert isinstance(recognise_norm(Norm()), NormFormula)
    assert isinstance(recognise_norm(HalfNorm()), Reason)


def test_a_property_and_a_class_attribute_are_read():
    class OwnNorm(Norm):
        factor = 1.0

        @property
        def scale(self):
            return self.factor

        def forward(self, x):
            return super().forward(x) * self.scale

    class OtherNorm(OwnNorm):
        factor = 1.001

    assert isinstance(recognise_norm(OwnNorm()), NormFormula)
    assert isinstance(recognise_norm(OtherNorm()), Reason)


def test_torchs_own_norms():
    assert recognise_norm(nn.LayerNorm(WIDTH, eps=1e-3))[:2] == ("layer", 1e-3)
    assert not recognise_norm(nn.LayerNorm(WIDTH, bias=False)).has_bias
    assert recognise_norm(nn.RMSNorm(WIDTH, eps=1e-3))[:4] == ("rms", 1e-3, 0.0, False)
    assert "eps depends on the dtype" in recognise_norm(nn.RMSNorm(WIDTH))
    for other in (nn.LayerNorm((4, WIDTH)), nn.LayerNorm(WIDTH, elementwise_affine=False)):
        assert "weight of one axis" in recognise_norm(other)
    assert isinstance(recognise_norm(nn.GroupNorm(4, WIDTH)), Reason)
    assert "running_mean" in recognise_norm(nn.BatchNorm1d(WIDTH))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_values_dtype_and_device_of_the_weight_do_not_matter(device, forgotten):
    module = norm(norm_formulas.gemma, eps=0.5).to(device)
    assert recognise_norm(module)[:4] == ("rms", 0.5, 1.0, False)


def test_recognition_leaves_everything_as_it_was(forgotten):
    module = NEAR_MISSES["dropout"]
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    state = {name: id(value) for name, value in vars(module).items()}
    random.seed(0)
    generators = torch.get_rng_state(), random.getstate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recognise_norm(module.eval())
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cuda")
    handle.remove()
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert torch.is_grad_enabled()
    assert not module.training
    assert {name: id(value) for name, value in vars(module.train()).items()} == state
    assert module.weight.grad is None
    assert not calls


def test_code_with_side_effects_is_refused_before_it_runs(forgotten):
    ran = []

    def forward(self, x):
        ran.append(1)
        return x

    class Forward:
        def __call__(self, x):
            ran.append(1)
            return x

    for planted in (norm(forward), norm(Forward()), norm(lambda self, x: exec("ran.append(1)"))):
        assert isinstance(recognise_norm(planted), Reason)
    assert not ran


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_recognition_works_inside_any_context(context, forgotten):
    with context(), torch.device("meta"):
        assert recognise_norm(LlamaRMSNorm(WIDTH)).offset == 0.0


def test_a_kind_is_traced_once(monkeypatch, forgotten):
    traced = []

    def trace(*args, own=recognise.norm.trace):
        traced.append(args)
        return own(*args)

    monkeypatch.setattr(recognise.norm, "trace", trace)
    for eps in (1e-6, 1e-6, 1e-3, 1e-3, 1e-6):
        assert recognise_norm(LlamaRMSNorm(WIDTH, eps=eps)).eps == eps
    assert len(traced) == 2


def test_a_norm_around_a_patched_function_is_another_kind(monkeypatch, forgotten):
    assert isinstance(recognise_norm(LlamaRMSNorm(WIDTH)), NormFormula)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "rsqrt", lambda x: x)
        assert isinstance(recognise_norm(LlamaRMSNorm(WIDTH)), Reason)
    assert isinstance(recognise_norm(LlamaRMSNorm(WIDTH)), NormFormula)


def test_a_reason_that_the_forward_catches_is_kept(forgotten):
    def forward(self, x):
        try:
            factor = self.factors[0]
        except Exception:
            factor = 1.0
        return self.weight * self._norm(x.float()).to(x.dtype) * factor

    assert "factors, a list" in recognise_norm(norm(forward, factors=[1.001]))
    assert "factors, which it does not have" in recognise_norm(norm(forward))


def test_a_tensor_from_outside_the_forward_is_not_recognised(forgotten):
    other = torch.ones(WIDTH)

    def forward(self, x):
        return other

    assert isinstance(recognise_norm(norm(forward)), Reason)


@pytest.mark.parametrize("mode", [AllDouble, lambda: torch.device("meta"), FakeTensorMode])
def test_the_modes_of_the_caller_change_nothing(mode, forgotten):
    norm = LlamaRMSNorm(WIDTH, eps=3e-5)
    with mode():
        found = recognise_norm(norm)
    assert found[:2] == ("rms", 3e-5)
    assert found.dtypes >= set(DTYPES)
