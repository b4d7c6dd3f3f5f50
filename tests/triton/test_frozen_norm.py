"""The frozen norms by Triton: outputs and gradients within their bounds, each row read once, what is kept and made again."""

import pytest
import torch
import torch.nn.functional as F
from lora_cases import LAYOUTS, draw
from norm_cases import EPS, KINDS, RMS, apply, bounds, make
from triton_cases import DTYPES, INT32_LIMIT, assert_same_bits_in_any_order, opcheck, watched

from lab.eager import EagerTraffic
from lab.testing import kept_for_backward
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.frozen_norm import (
    frozen_layer_norm,
    frozen_rms_norm,
    passes,
    rms_norm_reference,
)
from peftkit_kernels.ops.frozen_norm import schedule as steps
from peftkit_kernels.ops.frozen_norm.config import MAX_WIDTH, NormConfig
from peftkit_kernels.ops.lora_linear import lora_linear

every_kind = pytest.mark.parametrize("kind", KINDS)


def check(kind, x, weight, bias, dy, **watch):
    """Run one case, watched, and compare all of it; returns the launches."""
    with watched(**watch) as traffic:
        y = apply(kind, x, weight, bias, backend="triton")
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    assert dx.dtype == x.dtype
    for name, value, bound in zip("yx", (y, dx), bounds(kind, x, weight, bias, dy), strict=True):
        bound.check(value, name)
    assert [launch.kernel for launch in traffic.launches] == [
        "norm_forward_kernel",
        "norm_backward_kernel",
    ]
    return traffic.launches


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_error_bound(dtype, layout, kind):
    check(kind, *make((5, 7, 33), dtype, layout))


@every_kind
@pytest.mark.parametrize(
    "shape", [(33,), (1, 33), (65, 1), (3, 5, 2, 7), (16, 64), (3, 2050), (150, 16)], ids=str
)
def test_any_shape(shape, kind):
    for dtype in (torch.float32, torch.bfloat16):
        check(kind, *make(shape, dtype))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_of_a_wider_dtype(dtype, kind):
    """A float32 norm in a 16-bit model."""
    x, weight, bias, dy = make(dtype=dtype, weight_dtype=torch.float32)
    check(kind, x, weight, bias, dy)
    wide = kind in RMS and RMS[kind][1]
    assert apply(kind, x, weight, bias, backend="triton").dtype == (
        torch.float32 if wide else dtype
    )


@every_kind
def test_each_row_is_read_once_and_written_once(kind):
    """Kernels README: x and y forward; dy, x and dx backward."""
    x, weight, bias, dy = make((40, 64), torch.bfloat16)
    forward, backward = check(kind, x, weight, bias, dy)
    numbers = 4 * 40 * (1 if kind in RMS else 2)
    affine = weight.nbytes * (2 if kind == "layer" else 1)
    assert forward.total() == 2 * x.nbytes + affine + numbers
    assert backward.total() == 3 * x.nbytes + weight.nbytes + numbers
    streams = [
        forward.arguments["x_ptr"].load,
        forward.arguments["y_ptr"].store,
        backward.arguments["x_ptr"].load,
        backward.arguments["dy_ptr"].load,
        backward.arguments["dx_ptr"].store,
    ]
    for stream in streams:
        assert stream.requested_bytes == stream.unique_bytes == stream.sector_bytes == x.nbytes


@pytest.mark.parametrize("width", [33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residuals_are_added_in_the_same_pass(dtype, width):
    """The sum is rounded before its norm, as a model rounds it; a gradient's sum is rounded once."""
    generator = torch.Generator().manual_seed(3)
    x, weight, _, dy = make((2, 17, width), dtype)
    wide = torch.zeros(34, 2 * width, dtype=dtype)[:, :width].view(2, 17, width)
    residual = wide.copy_(draw((2, 17, width), dtype, generator))
    total = x.detach().clone()
    with watched(int32_limit=INT32_LIMIT) as traffic:
        y, rstd = passes.rms_forward_of_sum(total, residual, weight, EPS, 0.5, True)
        dx = passes.backward(dy, total, weight, None, rstd, 0.5, residual=residual)
    assert torch.equal(total, x.detach() + residual)
    plain, rstd = passes.rms_forward(total, weight, EPS, 0.5, True)
    assert torch.equal(y, plain)
    exact = passes.backward(*(dy.double().float(), total.float(), weight.float(), None, rstd, 0.5))
    expected = exact.double() + residual.double()
    eps = torch.finfo(dtype).eps
    assert ((dx.double() - expected).abs() <= 0.51 * eps * expected.abs() + 1e-5).all()
    forward, backward = traffic.launches
    if width == 64:
        numbers = 4 * 34 + weight.nbytes
        assert forward.total() == 4 * x.nbytes + numbers
        assert backward.total() == 4 * x.nbytes + numbers


def test_bytes_against_eager_at_training_sizes():
    """At M 8192, K 4096: the passes by the formula that the test above holds them to, eager counted on meta."""
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    with EagerTraffic() as plain:
        y = rms_norm_reference(x, weight, EPS)
        y.backward(torch.empty_like(y))
    assert 5 * x.nbytes / plain.unique_bytes <= 0.084


@every_kind
def test_offsets_of_rows_do_not_overflow(kind):
    check(kind, *make((90, 72), torch.bfloat16), int32_limit=INT32_LIMIT)


@every_kind
def test_results_do_not_depend_on_the_order_of_programs(kind):
    x, weight, bias, dy = make((130, 33), torch.bfloat16)

    def run():
        y = apply(kind, x, weight, bias, backend="triton")
        return y.detach(), *torch.autograd.grad(y, x, dy)

    assert_same_bits_in_any_order(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_keeps_x_and_one_or_two_numbers_a_row(kind, dtype):
    x, weight, bias, _ = make(dtype=dtype)
    with kept_for_backward(weight, bias) as kept:
        y = apply(kind, x, weight, bias, backend="triton")
    assert y.requires_grad
    assert kept.total_bytes == 17 * (33 * dtype.itemsize + 4 * (1 if kind in RMS else 2))


@every_kind
def test_what_it_makes_is_made_again_rather_than_kept(kind):
    x, weight, bias, _ = make((24, 16), torch.bfloat16)
    frozen, A, B = draw((3 * 16, 16), torch.bfloat16, torch.Generator().manual_seed(1)).split(16)
    lora = LoRA(A.clone().requires_grad_(), B.clone().requires_grad_(), 0.5)
    gradients = []
    for again in (True, False):
        y = apply(kind, x, weight, bias, backend="triton")
        y = y if again else y * 1
        with kept_for_backward(frozen, lora.A, lora.B, weight, bias) as kept:
            z = lora_linear(y, frozen, None, lora)
        assert (y.untyped_storage().data_ptr() in kept.storages) != again
        gradients.append(torch.autograd.grad(z.sum(), (x, lora.A, lora.B)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_strided_parameters():
    x, weight, bias, dy = make()
    wide = torch.stack([weight, bias], 1)
    check("layer", x, wide[:, 0], wide[:, 1], dy)


@pytest.mark.parametrize(("op", "widest"), MAX_WIDTH.items())
def test_rows_that_do_not_fit_the_registers_are_refused(op, widest):
    norm = {
        "frozen_rms_norm": lambda x, **options: frozen_rms_norm(x, x[0], EPS, **options),
        "frozen_layer_norm": lambda x, **options: frozen_layer_norm(x, x[0], None, EPS, **options),
    }[op]
    for K, most in ((widest + 16, widest), (widest - 1, widest // 2)):
        x = torch.zeros(1, K)
        said = rf"a row has {K} elements; .* up to {most}; use backend="
        with pytest.raises(ValueError, match=said):
            norm(x, backend="triton")
        assert torch.equal(norm(x), x)


@pytest.mark.parametrize(
    ("K", "elements"), [(1, 256), (64, 512), (65, 256), (576, 512), (4096, 512), (16384, 512)]
)
def test_a_program_holds_whole_rows(K, elements):
    """And a thread 16 of their elements, or 8 where it has to read them one by one."""
    c = NormConfig.choose(K, aligned=elements == 512)
    assert c.block_k >= K
    assert c.block_m * c.block_k <= elements * c.num_warps
    assert c.num_warps <= 32


@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_agrees_with_torchs_own(kind):
    x, weight, bias, _ = make((9, 64))
    own = F.rms_norm(x, (64,), weight, EPS)
    if kind == "layer":
        own = F.layer_norm(x, (64,), weight, bias, EPS)
    exact, _ = bounds(kind, x, weight, bias, x)
    exact.check(own, "torch's")
    exact.check(apply(kind, x, weight, bias, backend="triton"), "the kernel's")


def test_opcheck():
    x, weight, bias, _ = make((3, 33), torch.bfloat16)
    for parameter, *numbers in ((weight, 1.0, False), (weight.float(), 0.0, True)):
        call = steps.RMSNorm(x, parameter, EPS, *numbers)
        opcheck(steps, call, steps.frozen_rms_norm)
    for own in (bias, None):
        opcheck(steps, steps.LayerNorm(x, weight, own, EPS), steps.frozen_layer_norm)
