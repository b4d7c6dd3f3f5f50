"""The faithful interpreter: bfloat16 and TF32 as on a GPU, and the faults it exists to find."""

import lab_kernels as kernels
import numpy as np
import pytest
import torch
import triton
from triton.runtime.errors import InterpreterError

from lab import patching
from lab.interp import faithful, float32_to_bfloat16
from lab.testing import Bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def product(dtype, precision="ieee"):
    """Operands of a 30 x 28 product over 40, and the interpreter's result."""
    x, w = torch.randn(30, 40).to(dtype), torch.randn(28, 40).to(dtype)
    y = torch.full((30, 28), torch.nan)
    sizes = 30, 28, 40, 40, 40, 28
    kernels.matmul_nt[(2, 1)](x, w, y, *sizes, 16, 32, 16, precision)
    return x, w, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_right(dtype):
    with faithful():
        x, w, y = product(dtype)
    assert (Bound.of(x) @ Bound.of(w).T).check(y) > 0


def test_the_stock_interpreter_is_not():
    """What makes ``faithful`` necessary; a Triton that repairs this makes part of it superfluous."""
    x, w, y = product(torch.bfloat16)
    with pytest.raises(AssertionError, match="times the error bound"):
        (Bound.of(x) @ Bound.of(w).T).check(y)


def test_bfloat16_rounds_to_nearest_even():
    special = [1.99999, 3.3e38, -1e-40, 1e-45, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625]
    x = torch.cat([torch.randn(500), torch.tensor(special), torch.randn(500) * 1e-38])
    y = torch.zeros(x.shape, dtype=torch.bfloat16)
    with faithful():
        kernels.cast[(1,)](x, y, x.numel(), 1024)
    expected = x.to(torch.bfloat16)
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert y[~number].isnan().all()
    wide = torch.zeros(x.shape)
    with faithful():
        kernels.cast[(1,)](y, wide, x.numel(), 1024)
    assert torch.equal(wide[number], expected[number].float())


def test_a_nan_with_any_payload_stays_one():
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    rounded = torch.from_numpy(float32_to_bfloat16(bits.view(np.float32)).view(np.int16))
    assert rounded.view(torch.bfloat16).isnan().all()


def test_bfloat16_comparisons_are_of_numbers():
    x, y = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    expected = torch.minimum(x, y)
    with faithful():
        kernels.smaller[(1,)](x, y, 100, 128)
    assert torch.equal(y, expected)


def test_bfloat16_arithmetic_is_refused_or_rounded():
    x, y = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    expected = x + y
    with faithful(), pytest.raises(InterpreterError, match="add of bfloat16 tiles; widen"):
        kernels.add[(1,)](x, y, 100, 128)
    with faithful(strict_bf16=False):
        kernels.add[(1,)](x, y, 100, 128)
    assert torch.equal(y, expected)


def test_tf32_loses_what_a_gpu_loses():
    with faithful():
        x, w, y = product(torch.float32, "tf32")
    exact = Bound.of(x) @ Bound.of(w).T
    with pytest.raises(AssertionError, match="times the error bound"):
        exact.check(y)
    assert (Bound.of(x).tf32() @ Bound.of(w).T.tf32()).check(y) > 0.01
    with faithful(tf32=False):
        x, w, y = product(torch.float32, "tf32")
    (Bound.of(x) @ Bound.of(w).T).check(y)


def test_an_int32_offset_is_found_with_small_tensors():
    x, y = torch.randn(80, 72), torch.zeros(80, 72)
    with faithful(int32_limit=4096):
        kernels.copy_row[(80,)](x, y, 72, 72, 128, True)
        assert torch.equal(x, y)
        with pytest.raises(InterpreterError, match="int32 arithmetic exceeds ±4096; widen"):
            kernels.copy_row[(80,)](x, y, 72, 72, 128, False)
    with faithful():
        kernels.copy_row[(80,)](x, y, 72, 72, 128, False)


def test_programs_run_in_the_order_asked_for():
    last = {}
    for order in (None, "reverse", 1, 2, 3, 4):
        y = torch.zeros(8)
        with faithful(order=order):
            kernels.write_program_id[(6,)](y, 8)
        (last[order],) = y.unique().tolist()
    assert last[None] == 5
    assert last["reverse"] == 0
    assert len(set(last.values())) > 2


def test_options_nest_and_everything_is_put_back():
    before = {name: getattr(patching.Builder, name) for name in dir(patching.Builder)}
    x, y = torch.randn(80, 72), torch.zeros(80, 72)
    with faithful(int32_limit=4096):
        with faithful(order="reverse"), pytest.raises(InterpreterError, match="±4096"):
            kernels.copy_row[(80,)](x, y, 72, 72, 128, False)
        with faithful(int32_limit=2**31):
            kernels.copy_row[(80,)](x, y, 72, 72, 128, False)
    assert before == {name: getattr(patching.Builder, name) for name in dir(patching.Builder)}


def test_a_triton_with_other_private_methods_is_refused():
    class Changed(patching.Builder):
        def create_dot(self, a, b):
            raise NotImplementedError

    class Removed:
        pass

    with pytest.raises(RuntimeError, match=r"has create_dot\(self a b\), but.*install triton"):
        patching.check_methods(Changed)
    with pytest.raises(RuntimeError, match="has no cast_impl, but the lab patches"):
        patching.check_methods(Removed)


def test_outside_the_interpreter_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), faithful():
        pass
