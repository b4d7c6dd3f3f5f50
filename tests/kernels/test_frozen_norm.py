"""The frozen norms within their error bounds, with every rounding of the modules they stand in for."""

import pytest
import torch
import torch.nn.functional as F
from lora_cases import DTYPES, LAYOUTS, draw
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftkit_kernels.frozen_norm import (
    frozen_layer_norm,
    frozen_rms_norm,
    layer_norm_reference,
    rms_norm_reference,
)
from peftkit_kernels.testing import Bound, kept_for_backward

EPS = 1e-5
KINDS = {"llama": (0.0, True), "gemma": (1.0, False)}
rms_kind = pytest.mark.parametrize("kind", KINDS)


def make(shape=(17, 33), dtype=torch.float32, layout="contiguous"):
    """``x``, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = draw(shape, dtype, generator, layout).requires_grad_()
    weight, bias = (draw(shape[-1:], dtype, generator) for _ in range(2))
    return x, weight, bias, draw(shape, dtype, generator, layout)


def rms_bounds(x, weight, dy, offset, round_first):
    """Bounds on the output and the input gradient."""
    rows, K = Bound.of(x.reshape(-1, x.shape[-1])), x.shape[-1]
    square = (rows * rows).sum(1, keepdim=True) * (1 / K) + exact(EPS, rows)
    # the derivative of v^(-1/2), where it is largest within the error
    steepest = 0.5 * (square.value - square.error).pow(-1.5)
    rstd = square.map(torch.rsqrt, steepest, 4.0)
    factor, normed = Bound.of(weight), rows * rstd
    if offset:
        factor = factor + exact(offset, rows)
    if round_first:
        normed, factor = normed.round(x.dtype), factor.round(x.dtype)
    y = (normed * factor).round(x.dtype)

    u = Bound.of(dy.reshape(-1, K)) * factor
    correction = (u * rows).sum(1, keepdim=True) * (1 / K) * rstd * rstd
    dx = ((u + rows * correction * -1.0) * rstd).round(x.dtype)
    return y.reshape(*x.shape), dx.reshape(*x.shape)


def exact(value, like):
    return Bound(torch.tensor([value], dtype=torch.float64), torch.zeros(1).double(), like.unit)


def check_rms(x, weight, dy, kind):
    offset, round_first = KINDS[kind]
    y = frozen_rms_norm(x, weight, EPS, offset=offset, round_first=round_first)
    (dx,) = torch.autograd.grad(y, x, dy)
    y_bound, dx_bound = rms_bounds(x, weight, dy, offset, round_first)
    assert y.dtype == dx.dtype == x.dtype
    y_bound.check(y, "y")
    dx_bound.check(dx, "x")


@rms_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_within_the_error_bound(dtype, layout, kind):
    x, weight, _, dy = make(dtype=dtype, layout=layout)
    check_rms(x, weight, dy, kind)


@rms_kind
@pytest.mark.parametrize("shape", [(33,), (1, 33), (65, 1), (3, 5, 2, 7), (2, 64)], ids=str)
def test_rms_norm_of_any_shape(shape, kind):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, _, dy = make(shape, dtype)
        check_rms(x, weight, dy, kind)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # the modules compute float64 in float32
@pytest.mark.parametrize(("kind", "cls"), [("llama", LlamaRMSNorm), ("gemma", Gemma3RMSNorm)])
def test_rms_norm_rounds_where_the_module_does(kind, cls, dtype):
    x, weight, _, _ = make((65, 64), dtype)
    module = cls(64, eps=EPS).to(dtype).requires_grad_(False)
    module.weight.copy_(weight)
    offset, round_first = KINDS[kind]
    reference = rms_norm_reference(x, weight, EPS, offset=offset, round_first=round_first)
    assert torch.equal(reference, module(x))
    other = rms_norm_reference(x, weight, EPS, offset=offset, round_first=not round_first)
    assert torch.equal(other, module(x)) == (dtype.itemsize >= 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_torchs_bit_for_bit(dtype, layout, bias):
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
    offset, round_first = KINDS[kind]

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
    assert len(kept.storages) == 3
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
