"""The native passes against float64 and against the torch ops they stand in for, and how the library is built."""

import op_cases
import pytest
import torch
import torch.nn.functional as F
from lora_cases import activation, activation_and_slope
from markers import needs_native

from lab.testing import Bound, assert_no_worse_than
from peftkit_kernels import native
from peftkit_kernels.native import build, library
from peftkit_kernels.ops.frozen_norm import layer_norm_reference, rms_norm_reference
from peftkit_kernels.storage.int8.weight import MAX_WIDTH

SHAPES = [(1, 1), (1, 7), (3, 64), (17, 1001), (65, 33)]


def tensors(*shapes, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


@needs_native
@pytest.mark.parametrize("act", native.GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_its_gradient(shape, act):
    dh, e, g = tensors(shape, shape, shape, scale=2.0)
    h = native.gated(e, g, act)
    de, dg, again = native.gate_backward(dh.clone(), e, g, act)
    assert torch.equal(h, again)
    dh, g = Bound.of(dh), Bound.of(g)
    value, slope = activation_and_slope(Bound.of(e), act)
    (value * g).check(h, "h")
    (dh * g * slope).check(de, "de")
    (dh * value).check(dg, "dg")


@needs_native
@pytest.mark.parametrize("act", native.GATES)
def test_activations_over_their_whole_range(act):
    e = torch.cat([torch.linspace(-110, 110, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    # nothing cancels; below the smallest normal numbers, where these are too small to matter, no digit is promised
    bound = Bound.of(e).map(lambda v: activation(v, act), 1.13, 8.0)
    bound.error += 1e-25
    bound.check(native.gated(e, torch.ones_like(e), act))
    bad = torch.tensor([torch.nan, torch.inf])
    assert native.gated(bad, torch.ones(2), act).isfinite().logical_not().all()


@needs_native
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradient(shape, offset):
    x, dy, weight = tensors(shape, shape, shape[-1:])

    def by_autograd(dtype):
        leaf = x.to(dtype).requires_grad_()
        y = rms_norm_reference(leaf, weight.to(dtype), 1e-2, offset=offset)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    y, rstd = native.rms_norm(x, weight, 1e-2, offset)
    dx = native.rms_norm_backward(dy, x, weight, rstd, offset)
    assert rstd.shape == (shape[0], 1)
    for name, *values in zip(
        ("y", "dx"), (y, dx), by_autograd(torch.float32), by_autograd(torch.float64), strict=True
    ):
        assert_no_worse_than(*values, name)


@needs_native
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_layer_norm_and_its_gradient(shape, biased):
    x, dy, weight, bias = tensors(shape, shape, *[shape[-1:]] * 2)
    x += 3.0  # not centred to begin with

    def by_autograd(dtype):
        leaf, shift = x.to(dtype).requires_grad_(), bias.to(dtype) if biased else None
        y = layer_norm_reference(leaf, weight.to(dtype), shift, 1e-2)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    y, mean, rstd = native.layer_norm(x, weight, bias if biased else None, 1e-2)
    dx = native.layer_norm_backward(dy, x, weight, mean, rstd)
    assert mean.shape == rstd.shape == (shape[0], 1)
    for name, *values in zip(
        ("y", "dx"), (y, dx), by_autograd(torch.float32), by_autograd(torch.float64), strict=True
    ):
        assert_no_worse_than(*values, name)


@needs_native
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.05)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (17, 1001)], ids=str)
def test_cross_entropy_and_its_gradient(shape, smoothing, z_loss):
    (z,) = tensors(shape, scale=4.0)
    target = torch.arange(shape[0]) * 7 % shape[1]
    target[0] = -100 if shape[0] > 1 else 0

    def by_autograd(dtype):
        leaf = z.to(dtype).requires_grad_()
        lse = leaf.logsumexp(1)
        loss = F.cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
        counted = target >= 0
        rows = (loss + z_loss * lse.square()) * counted
        dz = torch.autograd.grad(rows.sum() * 0.5, leaf)[0]
        return rows.detach(), (lse * counted).detach(), dz

    values = z.clone()
    loss, lse = native.cross_entropy_(values, target, smoothing, z_loss, 0.5)
    plain, truth = by_autograd(torch.float32), by_autograd(torch.float64)
    for name, *triple in zip(("loss", "lse", "dz"), (loss, lse, values), plain, truth, strict=True):
        if triple[2].abs().max() > 1e-6:  # one class: the loss is nothing but rounding
            # a rounding in the sum of a row is in all of its gradient, and there are few rows
            assert_no_worse_than(*triple, name, factor=3.0)


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads():
    x, dy, weight = tensors((64, 1001), (64, 1001), (1001,))

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, rstd = native.rms_norm(x, weight, 1e-5, 0.0)
        z, *statistics = native.layer_norm(x, weight, weight, 1e-5)
        values = (
            z,
            native.layer_norm_backward(dy, x, weight, *statistics),
            *native.gate_backward(dy.clone(), x, y, "silu"),
            native.rms_norm_backward(dy, x, weight, rstd, 0.0),
            native.dropout(x, 6554, 1.1, 2**40),
            *native.scaled_gate_backward(dy, (x, y), (weight,) * 2, (weight,) * 2, "silu"),
            native.scale_backward(dy, x, weight, torch.empty_like(x)),
            native.updated_norm(x, dy[:5], y[:, :5].contiguous(), 0.5),
        )
        torch.set_num_threads(before)
        return y, *values

    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


@needs_native
def test_what_the_passes_do_not_take():
    x = torch.zeros(4, 6)
    assert native.supports(x, torch.nn.Parameter(x, requires_grad=False))
    assert not native.supports(x, x.double())
    assert not native.supports(x.t())
    assert not native.supports(x.to("meta"))
    leaf = x.clone().requires_grad_()
    assert not native.supports(leaf)
    with torch.no_grad():
        assert native.supports(leaf)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not native.supports(mode.from_tensor(x))


@pytest.mark.parametrize("name", op_cases.NAMES)
def test_ops_agree_with_and_without_the_passes(name, monkeypatch):
    options = {"p": 0.3} if name in op_cases.LORA_NAMES else {}
    case = op_cases.build(name, leading=(65,), **options)
    truth, plain = case.to(torch.float64).run(backend="reference"), case.run(backend="reference")
    with_passes = case.run()
    monkeypatch.setattr(library, "loaded", lambda: None)
    without = case.run()
    assert with_passes.keys() == without.keys()
    for key, value in without.items():
        assert_no_worse_than(value, plain[key], truth[key], key)
        assert_no_worse_than(with_passes[key], plain[key], truth[key], key)


def test_without_a_library_everything_runs(monkeypatch):
    monkeypatch.setattr(build, "load", lambda symbols: build.Native(None, "there is no compiler"))
    library.loaded.cache_clear()
    try:
        assert native.obstacle() == native.description() == "there is no compiler"
        assert not native.supports(torch.zeros(3))
        for name in op_cases.NAMES:
            assert op_cases.build(name).run()["x"].isfinite().all()
    finally:
        library.loaded.cache_clear()


@needs_native
@pytest.mark.parametrize("rank", [1, 7, native.MAX_RANK])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 32), (29, 301), (65, 1000)], ids=str)
def test_norm_of_an_updated_weight(shape, rank):
    weight, A, B = tensors(shape, (rank, shape[1]), (shape[0], rank), scale=0.5)
    actual = native.updated_norm(weight, A, B, -0.7)
    # the row is formed in float32 and its squares are summed; what the root makes of their error depends on their size
    updated = Bound.of(weight).addmm(Bound.of(B), Bound.of(A), -0.7)
    squares = (updated * updated).sum(1)
    smallest = (squares.value - squares.error).clamp(min=1e-30)
    squares.map(torch.sqrt, 0.5 / smallest.sqrt(), 1.0).check(actual)


@needs_native
@pytest.mark.parametrize("act", native.GATES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 7), (64, 33), (200, 129)], ids=str)
def test_scaled_gate_and_its_gradient(shape, act):
    dh, ze, zu, ge, gu, be, bu = tensors(*[shape] * 3, *[shape[1:]] * 4)
    h = native.scaled_gate((ze, zu), (ge, gu), (be, bu), act)
    dze, dzu, sums = native.scaled_gate_backward(dh, (ze, zu), (ge, gu), (be, bu), act)
    total = native.scale_backward(dh, ze, ge, scaled := torch.empty_like(dh))
    dh, ze, zu, ge, gu, be, bu = map(Bound.of, (dh, ze, zu, ge, gu, be, bu))
    e, u = ze * ge + be, zu * gu + bu
    value, slope = activation_and_slope(e, act)
    de, du = dh * u * slope, dh * value
    (value * u).check(h, "h")
    (de * ge).check(dze, "dze")
    (du * gu).check(dzu, "dzu")
    for name, bound, actual in zip(
        ("de z", "du z", "de", "du"), (de * ze, du * zu, de, du), sums, strict=True
    ):
        bound.sum(0).check(actual, name)
    (dh * ge).check(scaled, "scaled")
    (dh * ze).sum(0).check(total, "total")


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("M", "K", "N", "R"),
    [(1, 1, 1, 0), (7, 3, 17, 2), (13, 515, 33, 4), (64, 1024, 129, 16), (100, 1537, 300, 1)],
)
def test_int8_linear(M, K, N, R, transposed):
    generator = torch.Generator().manual_seed(0)
    codes, stored = (
        torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        for shape in ((M, K), (N, K) if transposed else (K, N))
    )
    weight = stored.t() if transposed else stored
    rows, columns, bias = (torch.randn(size, generator=generator) for size in (M, N, N))
    s, t = torch.randn(M, R, generator=generator), torch.randn(R, N, generator=generator)
    update = (s, t) if R else (None, None)
    product = Bound.of(codes.int() @ weight.int()).round(torch.float32)
    scales = Bound.of(rows[:, None]) * Bound.of(columns)
    expected = product * scales + (Bound.of(s) @ Bound.of(t) + Bound.of(bias))
    y = native.int8_linear(codes, weight, rows, columns, bias, *update)
    expected.check(y)
    more = native.int8_linear(codes, weight, rows, None, None, None, None, y.clone())
    (Bound.of(y) + product * Bound.of(rows[:, None])).check(more)


@needs_native
def test_sums_of_the_largest_codes_do_not_overflow():
    K = MAX_WIDTH
    codes = torch.full((2, K), 127, dtype=torch.int8)
    codes[1] = -127
    y = native.int8_linear(codes, codes[:1].t(), torch.ones(2), None, None, None, None)
    assert y[:, 0].tolist() == pytest.approx([127**2 * K, -(127**2) * K], rel=2**-23)


@needs_native
def test_int8_products_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (65, 700), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (700, 333), dtype=torch.int8, generator=generator)
    arguments = codes, weight, torch.rand(65), torch.rand(333), None, None, None
    one = native.int8_linear(*arguments)
    torch.set_num_threads(3)
    assert torch.equal(native.int8_linear(*arguments), one)
    torch.set_num_threads(1)
