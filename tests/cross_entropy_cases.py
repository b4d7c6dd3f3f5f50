"""Inputs, results and measurements shared by the tests of the logit-free loss."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.linear_cross_entropy import linear_cross_entropy

IGNORE = -100
LORA_SCALE = 0.5
NAMES = ("hidden", "weight", "bias", "A", "B")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(
    dtype=torch.float64, shape=(3, 21), V=53, D=24, R=3, *, factors=None, grad=NAMES, seed=3
):
    """Tensors by name, rounded to ``dtype`` (the factors to ``factors``), and targets with some rows ignored."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hidden": (*shape, D), "weight": (V, D), "bias": (V,), "A": (R, D), "B": (V, R)}
    tensors = {}
    for name, size in sizes.items():
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        values = values.to(factors or dtype if name in "AB" else dtype)
        tensors[name] = values.requires_grad_(name in grad)
    target = torch.randint(0, V, shape, generator=generator)
    target.view(-1)[::4] = IGNORE
    return tensors, target


def loss_and_grads(
    tensors, target, *, dtype=None, backend="torch", op=linear_cross_entropy, **options
):
    """The loss and every gradient by name. If ``dtype`` is given, the same values are cast to it first."""
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    bias = leaves["bias"] if options.pop("bias", False) else None
    lora = LoRA(leaves["A"], leaves["B"], LORA_SCALE) if options.pop("lora", False) else None
    loss = op(
        leaves["hidden"], leaves["weight"], target, bias=bias, lora=lora, backend=backend, **options
    )
    if loss.requires_grad:
        loss.backward(output_grad(loss))
    return {
        "loss": loss.detach(),
        **{name: t.grad for name, t in leaves.items() if t.grad is not None},
    }


def output_grad(loss):
    """A different weight for each row, so that a test detects a wrong factor in the backward."""
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)


class LargestResult(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    sees_native_calls = True
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                self.numel = max(self.numel, tensor.numel())
        return result
