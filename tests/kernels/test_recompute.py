"""Normalised activations are made again in backward, bit for bit, unless somebody changed them."""

import pytest
import torch
from torch import Tensor, nn

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.bottleneck import bottleneck
from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.ops.quantized_linear import fp8_linear, nf4_linear
from peftkit_kernels.storage.fp8 import quantize_fp8
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4

M, K, R = 24, 16, 4

NORMS = {
    "rms": lambda x, w: frozen_rms_norm(x, w, 1e-5),
    "gemma": lambda x, w: frozen_rms_norm(x, w, 1e-5, offset=1.0, round_first=False),
    "layer": lambda x, w: frozen_layer_norm(x, w, w, 1e-5),
}
OPS = {
    "lora_linear": lambda x, w, lora: lora_linear(x, w, None, lora),
    "lora_qkv": lambda x, w, lora: sum(lora_qkv(x, (w, w), (None, None), (lora, lora))),
    "lora_swiglu_mlp": lambda x, w, lora: lora_swiglu_mlp(x, (w,) * 3, (None,) * 3, (lora,) * 3),
    "nf4_linear": lambda x, w, lora: nf4_linear(x, quantize_nf4(w), None, lora),
    "fp8_linear": lambda x, w, lora: fp8_linear(x, quantize_fp8(w), None, lora),
    "int8_compute_linear": lambda x, w, lora: int8_compute_linear(x, quantize_int8(w), None, lora),
    "bottleneck": lambda x, w, lora: bottleneck(x, lora.A, None, lora.B, None),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, LoRA]:
    """X (trained), the norm's weight, a square frozen weight and an adapter."""
    generator = torch.Generator().manual_seed(0)
    x, norm, weight, A, B = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((M, K), (K,), (K, K), (R, K), (K, R))
    )
    return x.requires_grad_(), norm, weight, LoRA(nn.Parameter(A), nn.Parameter(B), 0.5)


def bytes_kept(run) -> tuple[Tensor, set[int]]:
    """The result of ``run`` and the addresses of what autograd keeps for it."""
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_a_kept_activation_bit_for_bit(norm, op, dtype):
    grads = []
    for keep in (False, True):
        x, norm_weight, weight, lora = inputs(dtype)
        normed = NORMS[norm](x, norm_weight)
        if keep:
            normed = normed * 1  # a tensor of the same values that no norm made
        OPS[op](normed, weight, lora).sum().backward()
        grads.append((x.grad, lora.A.grad, lora.B.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_normalised_activation_is_not_kept(norm, op):
    x, norm_weight, weight, lora = inputs()
    normed = NORMS[norm](x, norm_weight)
    _, kept = bytes_kept(lambda: OPS[op](normed, weight, lora))
    assert x.untyped_storage().data_ptr() in kept
    assert normed.untyped_storage().data_ptr() not in kept


def test_an_activation_changed_in_place_is_kept_as_it_is():
    x, norm_weight, weight, lora = inputs()
    normed = NORMS["rms"](x, norm_weight)
    normed += 1.0
    OPS["lora_linear"](normed, weight, lora).sum().backward()
    expected = 0.5 * torch.ones(M, K) @ lora.B
    assert torch.allclose(lora.A.grad, expected.T @ normed, rtol=1e-5)


def test_an_input_of_the_norm_changed_in_place_is_not_made_from():
    x, norm_weight, weight, lora = inputs()
    source = x * 1
    normed = NORMS["rms"](source, norm_weight)
    values = normed.detach().clone()
    source += 1.0
    y = OPS["lora_linear"](normed, weight, lora)
    (dA,) = torch.autograd.grad(y.sum(), lora.A)
    expected = 0.5 * torch.ones(M, K) @ lora.B
    assert torch.allclose(dA, expected.T @ values, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_activation_whose_norm_has_no_memory_is_kept(norm):
    """FSDP frees the weights of a block after its forward; what follows the block still reads its last norm's output."""
    grads = []
    for frees in (False, True):
        x, norm_weight, weight, lora = inputs()
        normed = NORMS[norm](x, norm_weight)
        values = norm_weight.clone()
        if frees:
            norm_weight.untyped_storage().resize_(0)
        y = OPS["lora_linear"](normed, weight, lora)
        found = list(torch.autograd.grad(y.sum(), (normed, lora.A, lora.B), retain_graph=True))
        if frees:
            norm_weight.untyped_storage().resize_(values.nbytes)
            norm_weight.data.copy_(values)
        grads.append([*found, *torch.autograd.grad(y.sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_activation_can_be_saved(tmp_path):
    x, norm_weight, weight, lora = inputs()
    normed = NORMS["rms"](x, norm_weight)
    torch.save(normed, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert torch.equal(loaded, normed)
    grads = [
        torch.autograd.grad(OPS["lora_linear"](t, weight, lora).sum(), lora.A)[0]
        for t in (loaded, normed)
    ]
    assert torch.equal(*grads)
