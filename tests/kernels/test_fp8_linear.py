"""``fp8_linear``: the codes of the definition, and everything after them within its running-error bound."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    Shape,
    draw,
    gradients,
    subsets,
)

from lab.testing import Bound, kept_for_backward
from peftkit_kernels.core.launch import Target, counting
from peftkit_kernels.core.plan import Kind, Plans
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.ops.quantized_linear import fp8_linear
from peftkit_kernels.storage.fp8 import (
    Float8Weight,
    dequantize_fp8,
    dequantize_fp8_reference,
    quantize_fp8,
)
from peftkit_kernels.storage.fp8.product import torch_impl
from peftkit_kernels.storage.fp8.reference import quantize_rows_reference

N = 29
TRAINED = ("x", "bias", "A", "B")
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""Every code; 0x7f and 0xff are NaN."""


def make(**options):
    """``x``, the stored weight and the projection it was made from."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    return x, quantize_fp8(part.weight.float()), part


def leaves_of(x, part):
    return {"x": x, **{name: t for name, t in part.tensors().items() if name != "weight"}}


def run(x, q, part, dy, **options):
    y = fp8_linear(x, q, part.bias, part.lora, **options)
    results = {"y": y.detach()}
    return results | (gradients(y, dy, leaves_of(x, part)) if y.requires_grad else {})


def scaled_product(values, codes, dtype):
    """The bound of ``values codes`` with the rows of ``values`` in float8, before anything is added."""
    quantised, scale = quantize_rows_reference(values)
    wide = torch.promote_types(dtype, torch.float32)
    return Bound.of(quantised.to(wide)) @ Bound.of(codes.to(wide)) * scale[:, None]


def bounds(x, q, part, dy):
    """The bound of each result of ``run``; roundings where the torch schedule has them."""
    dtype = x.dtype
    rows, grads = x.detach().reshape(-1, x.shape[-1]), dy.reshape(-1, N)
    linear = Linear(Bound.of(rows), part, dtype)
    linear.forward()
    y = scaled_product(rows, q.codes.t(), dtype) * q.row_scale[None]
    if part.bias is not None:
        y = y + Bound.of(part.bias)
    y = y.round(dtype)
    results = linear.backward(Bound.of(grads))
    dx = scaled_product(grads * q.row_scale, q.codes, dtype).round(dtype)
    if part.lora is not None:
        y = y.addmm(linear.s, linear.B.T, part.lora.scale).round(dtype)
        dx = linear.add_update(dx)
    results |= {"y": y, "x": dx}
    shapes = {"y": dy.shape, "x": x.shape}
    return {k: v.reshape(*shapes[k]) if k in shapes else v for k, v in results.items()}


def check(case, layout="contiguous", **options):
    x, q, part = case
    dy = draw((*x.shape[:-1], N), x.dtype, torch.Generator().manual_seed(1), layout)
    results, expected = run(x, q, part, dy, **options), bounds(x, q, part, dy)
    for name, value in results.items():
        assert value.dtype == (part.lora.A.dtype if name in "AB" else x.dtype)
        expected[name].check(value, name)
    return set(results)


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(dtype, factors, bias, p):
    case = make(x=(17, 33), dtype=dtype, factors=factors, bias=bias, p=p)
    assert check(case) == {"y", "x", "A", "B"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("rank", [0, 1, 24])
@pytest.mark.parametrize("rows", [0, 1, 3, 65])
def test_any_number_of_rows_and_rank(rows, rank):
    for dtype in (torch.float32, torch.bfloat16):
        case = make(x=(rows, 31), rank=rank, dtype=dtype)
        assert check(case) == {"y", "x", "bias"} | ({"A", "B"} if rank else set())


@pytest.mark.parametrize("K", [1, 7, 64, 301, 2048])
def test_any_width(K):
    assert len(check(make(x=(17, K)))) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout):
    assert len(check(make(x=(2, 5, 33), layout=layout), layout)) == 5


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    for p in (0.0, 0.1):
        assert check(make(trained=trained, p=p)) == {"y", *trained}


@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_keeps_what_lora_linear_keeps(trained):
    x, q, part = make(x=(17, 33), trained=trained)
    with kept_for_backward(*leaves_of(x.clone(), part).values(), *q.tensors()) as kept:
        y = fp8_linear(x, q, part.bias, part.lora)
    assert y.requires_grad
    assert kept.total_bytes == 4 * 17 * (33 * ("A" in trained) + 4 * ("B" in trained))


def test_near_the_product_in_full_precision():
    x, q, _ = make(x=(64, 512), rank=0, bias=False)
    exact = x @ dequantize_fp8(q).T
    y = fp8_linear(x, q)
    assert 0.02 < (y - exact).norm() / exact.norm() < 0.03
    dy = draw((64, N), torch.float32, torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy @ dequantize_fp8(q)
    assert 0.02 < (dx - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_reference_agrees(p):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x, q, part = make(x=(17, 33), dtype=dtype, p=p)
        dy = draw((17, N), dtype, torch.Generator().manual_seed(1))
        actual = run(x, q, part, dy)
        expected = run(x, q, part, dy, backend="reference")
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def test_gradients_of_the_reference():
    # of x it is a definition (quantising has no derivative); the rest is differentiated
    x, q, part = make(x=(3, 5), rank=2, dtype=torch.float64, p=0.3, trained=TRAINED[1:])

    def apply(bias, A, B):
        return fp8_linear(x, q, bias, LoRA(A, B, *part.lora.numbers()), backend="reference")

    assert torch.autograd.gradcheck(apply, (part.bias, part.lora.A, part.lora.B))
    leaf = x.clone().requires_grad_()
    dy = draw((3, N), torch.float64, torch.Generator().manual_seed(1))
    codes, scale = quantize_rows_reference(dy * q.row_scale)
    expected = codes.double() @ q.codes.double() * scale[:, None]
    y = fp8_linear(leaf, q, backend="reference")
    torch.testing.assert_close(
        torch.autograd.grad(y, leaf, dy)[0], expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(bad, backend):
    x, q, _ = make(x=(5, 64), rank=0, trained=("x",))
    expected = fp8_linear(x, q, backend=backend)
    dy = torch.ones(5, N)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    with torch.no_grad():
        x[2, 7] = bad
    y = fp8_linear(x, q, backend=backend)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], expected[others])
    assert not y[2].isfinite().any()
    dy[3, 1] = bad
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx[[0, 1, 2, 4]], expected_dx[[0, 1, 2, 4]])
    assert not dx[3].isfinite().any()


@pytest.mark.parametrize("layout", ["wide_rows", "transposed"])
def test_codes_may_have_any_strides(layout):
    x, q, part = make(x=(17, 33))
    expected = fp8_linear(x, q, part.bias, part.lora)
    codes = torch.zeros(N, 40, dtype=CODES.dtype)[:, 3:36].copy_(q.codes)
    if layout == "transposed":
        codes = torch.zeros(33, 2 * N, dtype=CODES.dtype).t()[::2].copy_(q.codes)
    strided = Float8Weight(codes, q.row_scale)
    actual = fp8_linear(x, strided, part.bias, part.lora)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": torch.ones(N, 33)}, r"q is a Tensor; it must be of type Float8Weight"),
        ({"q": quantize_fp8(torch.ones(N, 32))}, r"q has shape \(29, 32\) and x \(3, 33\)"),
        (
            {"x": torch.zeros(3, 33).to(CODES.dtype)},
            r"x is torch.float8_e4m3fn; .* keep this layer",
        ),
        ({"bias": torch.zeros(28)}, r"bias has shape \(28,\)"),
        ({"lora": LoRA(torch.ones(4, 32), torch.ones(N, 4), 1.0)}, r"lora: A \(4, 32\)"),
    ],
)
def test_errors_name_the_argument(options, message):
    arguments = {"x": torch.zeros(3, 33), "q": quantize_fp8(torch.ones(N, 33))} | options
    with pytest.raises(ValueError, match=message):
        fp8_linear(**arguments)


# several linears


def several(op, shapes, *, stored=True):
    """``x``, weights (float8, or their decoded values) and adapters of an op of three linears."""
    generator = torch.Generator().manual_seed(0)
    weights = [quantize_fp8(draw(shape, torch.float32, generator)) for shape in shapes]
    loras = [
        LoRA(*(draw(s, torch.float32, generator).requires_grad_() for s in ((4, K), (R, 4))), 0.1)
        for R, K in shapes
    ]
    x = draw((2, 7, shapes[0][1]), torch.float32, generator).requires_grad_()
    return x, weights if stored else [dequantize_fp8_reference(q) for q in weights], loras


def test_several_linears_quantise_their_input_once(monkeypatch):
    x, weights, loras = several(lora_qkv, [(48, 64)] * 3)
    calls = []

    def counted(value, run=torch_impl.quantize_input):
        calls.append(value.shape)
        return run(value)

    alone = [fp8_linear(x, q, None, lora) for q, lora in zip(weights, loras, strict=True)]
    monkeypatch.setattr(torch_impl, "quantize_input", counted)
    ys = lora_qkv(x, weights, [None] * 3, loras, backend="torch")
    assert calls == [(14, 64)]
    for ours, theirs in zip(ys, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = [x, *(t for lora in loras for t in (lora.A, lora.B))]
    found, expected = (torch.autograd.grad(sum(y.sum() for y in o), leaves) for o in (ys, alone))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", [lora_qkv, lora_swiglu_mlp], ids=lambda f: f.__name__)
def test_gradients_of_several_linears_are_near_those_of_the_decoded_weights(op, backend):
    shapes = [(48, 64)] * 3 if op is lora_qkv else [(48, 64), (48, 64), (64, 48)]
    results = []
    for stored in (True, False):
        x, weights, loras = several(op, shapes, stored=stored)
        options = ("silu",) if op is lora_swiglu_mlp else ()
        ys = op(x, weights, [None] * 3, loras, *options, backend=backend)
        ys = ys if isinstance(ys, tuple) else (ys,)
        leaves = [x, *(t for lora in loras for t in (lora.A, lora.B))]
        results.append(torch.autograd.grad(sum(y.sum() for y in ys), leaves))
    for ours, theirs in zip(*results, strict=True):
        assert not torch.equal(ours, theirs) or ours.shape != x.shape
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99


def test_a_dense_linear_among_them():
    x, weights, loras = several(lora_qkv, [(48, 64)] * 3)
    mixed = [weights[0], dequantize_fp8(weights[1]), weights[2]]
    for backend in ("torch", "reference"):
        ys = lora_qkv(x, mixed, [None] * 3, loras, backend=backend)
        (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
        decoded = sum(
            (torch.ones(2, 7, 48) @ (dequantize_fp8(q) + lora.scale * lora.B @ lora.A))
            for q, lora in zip(weights, loras, strict=True)
        )
        assert torch.cosine_similarity(dx.flatten(), decoded.flatten(), 0) > 0.99


# on GPUs that multiply in float8: torch._scaled_mm also has an implementation on the CPU


@pytest.fixture(params=[True, False], ids=["row scales", "one scale"])
def gpu(request, monkeypatch):
    """The paths of GPUs whose product takes scales of rows, and of those whose product does not, by torch operations on the CPU."""
    scales = request.param
    monkeypatch.setattr(torch_impl, "has_products", lambda x: True)
    monkeypatch.setattr(torch_impl, "scales_in_product", lambda x: scales)
    seen = []

    def product(codes, weight, *rest, run=torch.ops.aten._scaled_mm.default):
        seen.append((codes, weight, *rest))
        return run(codes, weight, *rest)

    class Fake:
        default = staticmethod(product)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", Fake)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_products_of_a_gpu(gpu, dtype):
    generator = torch.Generator().manual_seed(0)
    x = draw((17, 64), dtype, generator).requires_grad_()
    q, bias = quantize_fp8(draw((48, 64), torch.float32, generator)), draw((48,), dtype, generator)
    dy = draw((17, 48), dtype, generator)
    y = fp8_linear(x, q, bias, backend="torch")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert len(gpu) == 2
    for codes, weight, *_ in gpu:
        # what torch._scaled_mm demands of its operands on a GPU
        assert codes.is_contiguous()
        assert weight.t().is_contiguous()
    expected = fp8_linear(x, q, bias, backend="reference")
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=2 * unit, atol=8 * unit)
    torch.testing.assert_close(dx, expected_dx, rtol=2 * unit, atol=8 * unit)
    takes_scales = [call[6] is torch.bfloat16 for call in gpu]
    assert all(takes_scales) or not any(takes_scales)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((48, 33), "rows"), ((29, 64), "rows"), ((48, 64), "columns"), ((48, 64), "offset")],
)
def test_weights_that_a_gpu_cannot_multiply_in_float8(gpu, shape, layout):
    q = quantize_fp8(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    codes = q.codes
    if layout == "columns":
        codes = codes.t().contiguous().t()
    elif layout == "offset":
        codes = torch.empty(48 * 64 + 3, dtype=CODES.dtype)[3:].view(48, 64).copy_(codes)
    x = torch.randn(5, shape[1]).requires_grad_()
    y = fp8_linear(x, Float8Weight(codes, q.row_scale), backend="torch")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not gpu
    expected = fp8_linear(x, q, backend="reference")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


def test_which_gpus_multiply_in_float8():
    x = torch.zeros(2, 32)
    found = {}
    for arch in (
        "cuda:80",
        "cuda:86",
        "cuda:89",
        "cuda:90",
        "cuda:100",
        "cuda:110",
        "cuda:120",
        "hip:gfx942",
    ):
        with counting(Target(arch, 100)):
            found[arch] = torch_impl.has_products(x), torch_impl.scales_in_product(x)
    assert found == {
        "cuda:80": (False, False),
        "cuda:86": (False, False),
        "cuda:89": (True, True),
        "cuda:90": (True, True),
        "cuda:100": (True, True),
        "cuda:110": (True, False),
        "cuda:120": (True, True),
        "hip:gfx942": (False, False),
    }


@pytest.mark.parametrize("scales", [True, False], ids=["row scales", "one scale"])
def test_a_launch_plan_replays_the_products_of_a_gpu(monkeypatch, scales):
    monkeypatch.setattr(torch_impl, "has_products", lambda x: True)
    monkeypatch.setattr(torch_impl, "scales_in_product", lambda x: scales)

    def products(x, weight, dy):
        q = Float8Weight(*weight)
        return torch_impl.linear(torch_impl.quantize_input(x), q, None), torch_impl.input_grad(
            dy, q
        )

    plans = Plans(products, [Kind("tensor", False), Kind("tensor", True), Kind("tensor", False)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, dy = (draw((17, width), torch.bfloat16, generator) for width in (64, 48))
        weight = quantize_fp8(draw((48, 64), torch.float32, generator)).tensors()
        for found, expected in zip(plans(x, weight, dy), products(x, weight, dy), strict=True):
            assert torch.equal(found, expected)
    assert len(plans.sources) == 1


def test_a_step_on_a_gpu_quantises_once_for_three_linears():
    """Counted without a GPU: the launches of Triton kernels in each step, with a launch plan and without."""
    x, weights, loras = several(lora_qkv, [(48, 64)] * 3)
    x = x.detach().bfloat16().requires_grad_()
    with counting(Target("cuda:90", 132)) as counter:
        launches = []
        for _ in range(3):
            before = counter.launches
            ys = lora_qkv(x, weights, [None] * 3, loras)
            forward = counter.launches - before
            sum(y.sum() for y in ys).backward()
            launches.append((forward, counter.launches - before - forward))
    # forward: s of all, codes of x, an update of each; backward: dB and ds of each, codes of dy and a transposed weight for
    # each, the updates of dx, dA
    assert launches == [(5, 11)] * 3
