"""Adapters are at least half as precise as PEFT's in every pair of dtypes of base and adapter, on torch ops."""

import pytest
import torch
from lora_cases import draw
from precision_cases import DTYPES, EAGER, PAIRS, errors, make

from lab.testing import Made, kept_for_backward
from peftkit_kernels import low_rank
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear import lora_linear

every_pair = pytest.mark.parametrize(
    ("dtype", "factors"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@every_pair
@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_further_from_float64_than_twice_as_far_as_peft(name, dtype, factors, backend):
    for key, (error, plain) in errors(make(name, dtype, factors), name, backend=backend).items():
        assert error <= 2 * plain, f"{key}: {error:.3g}, PEFT {plain:.3g}"


@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_small_gradients_of_a_float16_base_keep_their_digits(name, factors):
    case = make(name, torch.float16, factors)
    for key, (error, plain) in errors(case, name, size=1e-4, backend="torch").items():
        assert error <= 2 * plain, f"{key}: {error:.3g}, PEFT {plain:.3g}"


def test_the_mask_of_a_block_of_rows_is_that_of_the_whole(monkeypatch):
    """Rows are cast in blocks, and each block has to find its place in the mask."""
    generator = torch.Generator().manual_seed(0)
    x = draw((50, 33), torch.bfloat16, generator).requires_grad_()
    weight = draw((29, 33), torch.bfloat16, generator)
    A = draw((4, 33), torch.float32, generator).requires_grad_()
    B = draw((29, 4), torch.float32, generator).requires_grad_()

    def step():
        y = lora_linear(x, weight, None, LoRA(A, B, 1.5, 0.3, 2**40), backend="torch")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, A, B))]

    whole = step()
    monkeypatch.setattr(low_rank.torch_impl, "_CPU_BLOCK", 1)
    assert len(list(low_rank.blocks(x))) == 4
    for actual, expected in zip(step(), whole, strict=True):
        bits = 2.0**-8 if actual.dtype is torch.bfloat16 else 2.0**-20
        assert (actual - expected).norm() <= bits * expected.norm()


def test_no_float32_tensor_of_the_size_of_the_input():
    x = torch.randn(4096, 512).bfloat16().requires_grad_()
    weight = torch.randn(512, 512).bfloat16()
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((8, 512), (512, 8)))
    with kept_for_backward(weight, A, B) as kept, Made(x, weight, A, B) as made:
        lora_linear(x, weight, None, LoRA(A, B, 1.0), backend="torch").sum().backward()
    assert made.largest_bytes == x.nbytes
    # x, and s in float32
    assert kept.total_bytes == x.nbytes + 4096 * 8 * 4
