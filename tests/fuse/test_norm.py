"""Which norms are fused, and when a fused norm runs its own forward."""

import copy
import pickle
import threading

import models
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftkit import BottleneckConfig, wrap
from peftkit.fuse.norm import FusedNorm, fuse_norms
from peftkit.fuse.plan import declined

WIDTH = 32


def frozen(norm, dtype=torch.float32):
    """A norm with weights other than one, a fused copy, and the number of fused norms."""
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.data[3] = 20.0  # real checkpoints have such channels
    norm = norm.to(dtype).requires_grad_(False)
    twin = copy.deepcopy(norm)
    return norm, twin, fuse_norms(twin)


def draw(*shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (scale * torch.randn(*shape, generator=generator) + 0.3 * scale).to(dtype)


class OtherNorm(LlamaRMSNorm):
    """A norm with another last operation."""

    def forward(self, x):
        return super().forward(x) * 1.001


def truth(norm, x):
    """The formula in float64, with the module's current parameters."""
    wide, weight = x.double(), norm.weight.double()
    if isinstance(norm, (nn.LayerNorm, CohereLayerNorm)):
        wide = wide - wide.mean(-1, keepdim=True)
    if isinstance(norm, Gemma3RMSNorm):
        weight = weight + 1.0
    eps = next(getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n))
    y = weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    bias = getattr(norm, "bias", None)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (LlamaRMSNorm, "frozen RMSNorm"),
        (T5LayerNorm, "frozen RMSNorm"),
        (Gemma3RMSNorm, "frozen RMSNorm"),
        (nn.RMSNorm, "frozen RMSNorm"),
        (nn.LayerNorm, "frozen LayerNorm"),
        (CohereLayerNorm, "frozen LayerNorm"),
    ],
)
def test_known_norms_give_their_own_output(cls, method, dtype, scale):
    norm, fused, count = frozen(cls(WIDTH, eps=1e-3), dtype)
    assert count == 1
    assert isinstance(fused, cls)
    assert fused.peftkit_method == method
    assert fused.peftkit_verdict() == ("fused:torch", "")
    x = draw(5, 7, WIDTH, scale=scale, dtype=dtype).requires_grad_()
    y, own, exact = fused(x), norm(x), truth(norm, x)
    assert y.dtype == own.dtype
    # twice the module's own error, which depends on the order of its sums, plus one rounding of each value
    allowed = 2 * (own - exact).abs().max() + torch.finfo(dtype).eps * exact.abs()
    assert ((y - exact).abs() <= allowed).all()
    dy = draw(5, 7, WIDTH, dtype=dtype)
    (dx,), (dx_own,) = (torch.autograd.grad(out, x, dy) for out in (y, own))
    exact_x = x.detach().double().requires_grad_()
    (dx_exact,) = torch.autograd.grad(truth(norm, exact_x), exact_x, dy.double())
    floor = 4 * torch.finfo(dtype).eps * dx_exact.abs().max()
    assert (dx - dx_exact).abs().max() <= 2 * (dx_own - dx_exact).abs().max() + floor


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (OtherNorm(WIDTH), "no RMSNorm or LayerNorm that has a fused form"),
        (Qwen3NextRMSNormGated(WIDTH), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_norm_is_not_fused_and_has_a_reason(norm, reason):
    _, twin, count = frozen(norm)
    assert count == 0
    assert type(twin) is type(norm)
    method, found = declined(twin)
    assert method == "frozen norm"
    assert reason in found


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((4, WIDTH)),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.Linear(WIDTH, WIDTH),
        nn.PReLU(WIDTH),
        nn.RMSNorm(1, eps=1e-6),
        nn.BatchNorm1d(WIDTH),
        nn.InstanceNorm2d(WIDTH, affine=True),
        nn.GroupNorm(4, WIDTH),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_modules_that_are_no_norm_of_the_last_axis_get_no_row(norm):
    assert fuse_norms(norm.requires_grad_(False)) == 0
    assert declined(norm) is None


def test_a_trained_norm_is_fused_only_after_it_is_frozen():
    norm = LlamaRMSNorm(WIDTH)
    assert fuse_norms(norm) == 0
    assert "is trained" in declined(norm)[1]
    assert fuse_norms(norm.requires_grad_(False)) == 1
    assert declined(norm) is None


def test_hooks_of_a_fused_norm_run():
    norm, fused, count = frozen(LlamaRMSNorm(WIDTH))
    seen = []
    fused.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    fused.register_forward_hook(lambda module, args, y: seen.append(y.shape) or y + 1.0)
    fused.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    x = draw(3, WIDTH).requires_grad_()
    y = fused(x)
    y.sum().backward()
    assert count == 1
    assert fused.peftkit_verdict()[0] == "fused:torch"
    torch.testing.assert_close(y, norm(2.0 * x) + 1.0)
    assert seen == [(3, WIDTH), "backward"]


def test_a_norm_with_hooks_is_fused_and_keeps_them():
    norm = LlamaRMSNorm(WIDTH).requires_grad_(False)
    norm.register_forward_hook(lambda module, args, y: y + 1.0)
    own = norm(x := draw(3, WIDTH))
    assert fuse_norms(norm) == 1
    torch.testing.assert_close(norm(x), own)


def test_a_norm_with_a_replaced_forward_is_not_fused():
    norm = LlamaRMSNorm(WIDTH).requires_grad_(False)
    norm.forward = lambda x: x
    assert fuse_norms(norm) == 0
    assert "forward is replaced" in declined(norm)[1]


def test_a_norm_inside_an_adapter_is_not_fused_even_if_frozen():
    config = BottleneckConfig(bottleneck_size=4, layer_norm=True)
    model = wrap(models.tiny("llama").eval(), config).requires_grad_(False)
    own = [m for n, m in model.named_modules() if n.endswith("adapters.default.norm")]
    assert len(own) == 4
    assert fuse_norms(model) == 0, "wrap has fused the norms of the model"
    assert {type(m) for m in own} == {nn.LayerNorm}


def test_float64_runs_the_own_forward_of_modules_that_compute_in_float32():
    assert frozen(LlamaRMSNorm(WIDTH), torch.float64)[2] == 0
    assert frozen(nn.LayerNorm(WIDTH), torch.float64)[2] == 1


def test_a_norm_with_an_optional_gate_accepts_one():
    class GatedNorm(LlamaRMSNorm):
        def forward(self, x, gate=None):
            y = super().forward(x)
            return y if gate is None else y * gate

    norm, fused, count = frozen(GatedNorm(WIDTH))
    x, gate = draw(2, 3, WIDTH).unbind(0)
    assert count == 1
    torch.testing.assert_close(fused(x), norm(x))
    assert torch.equal(fused(x, gate), norm(x, gate))
    assert torch.equal(fused(x, gate=gate), norm(x, gate=gate))


def test_arguments_by_name_run_the_modules_own_forward():
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    x = torch.randn(3, WIDTH)
    assert torch.equal(fused(hidden_states=x), norm(hidden_states=x))


@pytest.mark.parametrize("change", ["trained", "other_dtype", "autocast"])
def test_unsupported_inputs_run_the_modules_own_forward(change):
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    x = torch.randn(3, WIDTH)
    if change == "trained":
        norm.weight.requires_grad_()
        fused.weight.requires_grad_()
        path, reason = fused.peftkit_verdict()
        assert path == "peft"
        assert "is trained" in reason
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


def test_on_the_meta_device():
    with torch.device("meta"):
        norm = LlamaRMSNorm(WIDTH).requires_grad_(False)
        assert fuse_norms(norm) == 1
        assert norm(torch.empty(2, 3, WIDTH)).shape == (2, 3, WIDTH)
    assert norm.peftkit_example().device.type == "meta"
    assert norm.peftkit_verdict() == ("fused:torch", "")


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2.0 * weight


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_parametrised_weight_runs_the_modules_own_forward(after):
    norm = LlamaRMSNorm(WIDTH).requires_grad_(False)
    if not after:
        parametrize.register_parametrization(norm, "weight", Doubled())
    assert fuse_norms(norm.requires_grad_(False)) == after
    if after:
        parametrize.register_parametrization(norm, "weight", Doubled())
        path, reason = norm.peftkit_verdict()
        assert path == "peft"
        assert "parametrised" in reason
    else:
        assert "parametrised" in declined(norm)[1]
    x = draw(3, WIDTH)
    own = LlamaRMSNorm(WIDTH)
    own.weight.data.fill_(2.0)
    assert torch.equal(norm(x), own(x))


def test_under_autocast_a_16_bit_layer_norm_runs_torchs():
    """On a GPU autocast computes it in float32 and returns float32."""
    norm, fused, _ = frozen(nn.LayerNorm(WIDTH), torch.bfloat16)
    llama, fused_llama, _ = frozen(LlamaRMSNorm(WIDTH), torch.bfloat16)
    x = draw(3, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(x), norm(x))
        assert "autocast" in fused.peftkit_verdict()[1]
        assert fused_llama.peftkit_verdict() == ("fused:torch", "")
        assert fused_llama(x).dtype == llama(x).dtype
    assert fused.peftkit_verdict() == ("fused:torch", "")


@pytest.mark.parametrize("cls", [LlamaRMSNorm, nn.LayerNorm])
def test_copies_and_pickles_stay_fused_and_detect_changes(cls):
    norm, fused, _ = frozen(cls(WIDTH, eps=1e-3))
    x = draw(3, WIDTH)
    name = "variance_epsilon" if cls is LlamaRMSNorm else "eps"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin.peftkit_verdict() == ("fused:torch", "")
        assert torch.equal(twin(x), fused(x))
        setattr(twin, name, 0.5)
        path, reason = twin.peftkit_verdict()
        assert path == "peft"
        assert "0.001" in reason
        assert "0.5" in reason
        setattr(norm, name, 0.5)
        assert torch.equal(twin(x), norm(x))
        setattr(norm, name, 1e-3)
    assert fused.peftkit_verdict()[0] == "fused:torch", "the original is unchanged"


def test_fusing_again_examines_changed_norms_again():
    _, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    fused.variance_epsilon = 0.5
    assert fused.peftkit_verdict()[0] == "peft"
    assert fuse_norms(fused) == 0, "the norm is fused already"
    assert fused.peftkit_verdict()[0] == "fused:torch"
    own = LlamaRMSNorm(WIDTH, eps=0.5)
    own.weight = fused.weight
    torch.testing.assert_close(fused(x := draw(3, WIDTH)), own(x))
    fused.variance_epsilon = torch.tensor([0.5, 0.5])
    assert fuse_norms(fused) == 0
    assert type(fused) is LlamaRMSNorm
    assert "variance_epsilon" in declined(fused)[1]


def test_another_input_runs_the_modules_own_forward():
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    for x in (draw(3, 1), draw(3, WIDTH, dtype=torch.float64), draw(3, WIDTH).to_sparse()):
        outcomes = []
        for module in (norm, fused):
            try:
                outcomes.append(module(x))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        same = outcomes[0] == outcomes[1]
        assert same if isinstance(same, bool) else same.all()
    with pytest.raises(AttributeError):
        fused([1.0])


def test_a_weight_or_bias_of_another_shape_runs_the_modules_own_forward():
    _, fused, _ = frozen(nn.LayerNorm(WIDTH, bias=False))
    fused.bias = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
    assert "another shape" in fused.peftkit_verdict()[1]
    own = nn.LayerNorm(WIDTH)
    own.weight, own.bias = fused.weight, fused.bias
    assert torch.equal(fused(x := draw(3, WIDTH)), own(x))


def test_threads_can_share_a_norm():
    norm, fused, _ = frozen(LlamaRMSNorm(WIDTH))
    expected, found = norm(x := draw(4, WIDTH)), []

    def run():
        found.extend(fused(x) for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    for y in found:
        torch.testing.assert_close(y, expected)
