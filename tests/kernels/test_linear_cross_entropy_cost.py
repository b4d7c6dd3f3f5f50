"""What the logit-free loss may allocate, keep and multiply."""

import pytest
import torch
from cross_entropy_cases import DTYPES, IGNORE, LargestResult, inputs, loss_and_grads
from torch.utils.flop_counter import FlopCounterMode

from peftkit_kernels.ops.linear_cross_entropy import linear_cross_entropy
from peftkit_kernels.ops.linear_cross_entropy.config import choose_chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_more_than_one_chunk_of_logits(dtype, reduction):
    M, V, chunk = 64, 211, 8
    tensors, target = inputs(dtype, shape=(M,), V=V, D=6, grad=("hidden", "A", "B"))
    options = {"lora": True, "softcap": 3.0, "label_smoothing": 0.1, "reduction": reduction}
    with LargestResult() as largest:
        loss_and_grads(tensors, target, chunk=chunk, **options.copy())
    assert largest.numel == chunk * V
    with LargestResult() as largest:
        loss_and_grads(tensors, target, backend="reference", **options.copy())
    assert largest.numel == M * V, "the reference should have been seen to form all logits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_the_hidden_gradient_only(dtype):
    M, D = 40, 12
    tensors, target = inputs(dtype, shape=(M,), D=D, grad=("hidden",))
    target.clamp_(min=0)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        linear_cross_entropy(tensors["hidden"], tensors["weight"], target)
    # The divisor of the sum, whether any row is counted, and the gradient.
    assert sorted(t.numel() for t in kept) == [1, 1, M * D]
    assert max(t.nbytes for t in kept) == M * D * dtype.itemsize


def test_ignored_rows_are_not_multiplied():
    tensors, target = inputs(torch.float32, shape=(64,), grad=("hidden",))
    target[:48] = IGNORE
    target[48:] = 1
    with FlopCounterMode(display=False) as counter:
        loss_and_grads(tensors, target)
    assert counter.get_total_flops() == 4 * 16 * 53 * 24


@pytest.mark.parametrize(
    ("M", "V", "itemsize", "cpu", "expected"),
    [
        (512, 49152, 4, True, 128),
        (510, 49152, 4, True, 170),
        (100, 49152, 4, True, 100),
        (4096, 2**24, 4, True, 16),
        (0, 49152, 4, True, 1),
        (8192, 49152, 2, False, 2048),
        (8192, 2**20, 4, False, 256),
    ],
)
def test_chunk_follows_from_the_sizes(M, V, itemsize, cpu, expected):
    assert choose_chunk(M, V, itemsize=itemsize, cpu=cpu) == expected
