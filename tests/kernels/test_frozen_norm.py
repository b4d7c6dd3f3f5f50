"""The frozen norms within their error bounds, with every rounding of the modules they stand in for."""

import pytest
import torch
import torch.nn.functional as F
from lora_cases import DTYPES, LAYOUTS
from norm_cases import EPS, RMS, apply, bounds, make
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lab.testing import kept_for_backward
from peftkit_kernels.ops.frozen_norm import (
    frozen_layer_norm,
    frozen_rms_norm,
    layer_norm_reference,
    rms_norm_reference,
)

rms_kind = pytest.mark.parametrize("kind", ["llama", "gemma"])
KINDS = ("llama", "gemma", "layer", "layer_no_bias")


def check(kind, x, weight, bias, dy):
    y = apply(kind, x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == x.dtype
    for name, value, bound in zip("yx", (y, dx), bounds(kind, x, weight, bias, dy), strict=True):
        bound.check(value, name)


# in 16 bits the gradient of LayerNorm is torch's own, which rounds the statistics
CASES = [(kind, dtype) for kind in KINDS for dtype in DTYPES if kind in RMS or dtype.itemsize >= 4]
every_case = pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_within_the_error_bound(dtype, layout, kind):
    check(kind, *make(dtype=dtype, layout=layout))


@every_case
@pytest.mark.parametrize("shape", [(33,), (1, 33), (65, 1), (3, 5, 2, 7), (2, 64)], ids=str)
def test_any_shape(shape, kind, dtype):
    check(kind, *make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # the modules compute float64 in float32
@pytest.mark.parametrize(("kind", "cls"), [("llama", LlamaRMSNorm), ("gemma", Gemma3RMSNorm)])
def test_rms_norm_rounds_where_the_module_does(kind, cls, dtype):
    x, weight, _, _ = make((65, 64), dtype)
    module = cls(64, eps=EPS).to(dtype).requires_grad_(False)
    module.weight.copy_(weight)
    offset, round_first = RMS[kind]
    reference = rms_norm_reference(x, weight, EPS, offset=offset, round_first=round_first)
    assert torch.equal(reference, module(x))
    other = rms_norm_reference(x, weight, EPS, offset=offset, round_first=not round_first)
    assert torch.equal(other, module(x)) == (dtype.itemsize >= 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float32], ids=str)
def test_layer_norm_without_a_native_pass_is_torchs_bit_for_bit(dtype, layout, bias):
    x, weight, b, dy = make(dtype=dtype, layout=layout)
    b = b if bias else None
    y, plain = frozen_layer_norm(x, weight, b, EPS), F.layer_norm(x, (33,), weight, b, EPS)
    assert torch.equal(y, plain)
    assert torch.equal(layer_norm_reference(x, weight, b, EPS), plain)
    (dx,), (expected,) = (torch.autograd.grad(out, x, dy) for out in (y, plain))
    assert torch.equal(dx, expected)


@rms_kind
def test_references_pass_gradcheck(kind):
    x, weight, bias, _ = make((3, 5), torch.float64)
    offset, round_first = RMS[kind]

    def rms(x):
        return frozen_rms_norm(
            x, weight, EPS, offset=offset, round_first=round_first, backend="reference"
        )

    def layer(x):
        return frozen_layer_norm(x, weight, bias, EPS, backend="reference")

    assert torch.autograd.gradcheck(rms, x)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_x_and_one_number_a_row(dtype):
    x, weight, bias, _ = make(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    with kept_for_backward(weight, bias) as kept:
        y = frozen_rms_norm(x, weight, EPS)
    assert kept.total_bytes == 17 * (33 * dtype.itemsize + wide)
    with kept_for_backward(weight, bias) as kept:
        z = frozen_layer_norm(x, weight, bias, EPS)
    assert kept.total_bytes <= 17 * (33 * dtype.itemsize + 2 * wide)
    assert y.requires_grad
    assert z.requires_grad


def test_weight_of_a_wider_dtype():
    """A float32 norm in a bfloat16 model: the output is float32, as the module's own."""
    x, weight, _, _ = make(dtype=torch.bfloat16)
    wide = weight.float()
    y, plain = frozen_rms_norm(x, wide, EPS), rms_norm_reference(x, wide, EPS)
    assert y.dtype == plain.dtype == torch.float32
    assert torch.equal(y, plain)
    dy = torch.ones_like(y)
    grads = [torch.autograd.grad(out, x, dy)[0] for out in (y, plain)]
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    "norm", [frozen_rms_norm, lambda x, w, eps: frozen_layer_norm(x, w, None, eps)]
)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(32), r"weight has shape \(32,\) and x \(17, 33\); weight must be \[K\]"),
        (torch.zeros(1, 33), r"weight has shape \(1, 33\)"),
        (torch.zeros(33, requires_grad=True), r"weight requires a gradient.*; freeze it or use"),
    ],
)
def test_errors_name_the_argument(norm, weight, message):
    with pytest.raises(ValueError, match=message):
        norm(make()[0], weight, EPS)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(32), r"bias has shape \(32,\) and x \(17, 33\); bias must be \[K\]"),
        (torch.zeros(33, requires_grad=True), "bias requires a gradient.*; freeze it"),
    ],
)
def test_a_bias_that_does_not_fit_or_is_trained_is_refused(bias, message):
    x, weight, _, _ = make()
    with pytest.raises(ValueError, match=message):
        frozen_layer_norm(x, weight, bias, EPS)
