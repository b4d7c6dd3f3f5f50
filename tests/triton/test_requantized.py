"""Weights that are merged and quantised again, by Triton: their values, and the ops that add no update to them."""

import pytest
import torch
from requantized_cases import BASES, case, draw, joined, straight_through
from torch.nn import functional as F

from peftkit_kernels.ops.lora_linear.schedule import linears
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.storage.quantized import decode_triton, dequantize_reference, stacked_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_decodes_to_the_definition(name, dtype):
    q, _ = case(name)
    found, expected = decode_triton(q, dtype), dequantize_reference(q, dtype)
    # the kernel sums the update in another order, so that an element in the middle of two levels may differ
    close = torch.isclose(
        found.float(), expected.float(), rtol=2**-7 if dtype.itemsize == 2 else 1e-5
    )
    # a nested maximum gets its nearest code, which is not always the one that bitsandbytes finds on the CPU
    assert close.float().mean() > (0.98 if "nested" in name else 0.999)


def test_several_are_decoded_into_one_buffer():
    qs = [case("nf4", 0.0, N=8)[0], case("nf4", 0.0, N=16)[0]]
    expected = torch.cat([dequantize_reference(q, torch.float32) for q in qs])
    assert torch.equal(stacked_triton(qs, torch.float32), expected)


@pytest.mark.parametrize("name", ["nf4, nested", "int8", "float32 to nf4"])
@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_pass_through_the_rounding_in_replays_too(name, rows):
    for seed in range(3):
        q, lora = case(name, 0.3)
        x, bias = draw(1, rows, 256, seed=seed).requires_grad_(), draw(24, seed=4)
        leaves = [x, lora.A.requires_grad_(), lora.B.requires_grad_()]
        (y,) = lora_qkv(x, [q], [bias], [lora], backend="triton")
        truth = F.linear(x, straight_through(q, lora), bias)
        found, expected = (torch.autograd.grad(one.square().sum(), leaves) for one in (y, truth))
        for ours, theirs in zip([y, *found], [truth, *expected], strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert linears.plans.sources, "no plan was made"


@pytest.mark.parametrize("merged", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("op", ["qkv", "mlp"])
def test_beside_weights_with_a_separate_update(op, merged):
    for seed in (0, 100):
        run, truth = joined(op, merged, seed)
        for ours, theirs in zip(run("triton"), truth, strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
