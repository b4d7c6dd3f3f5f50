"""Weights that are merged and quantised again: what bitsandbytes stores, and gradients that pass through the rounding."""

import bitsandbytes.functional as bnb
import pytest
import torch
from requantized_cases import BASES, case, draw, joined, straight_through
from torch.nn import functional as F

from peftkit_kernels import native
from peftkit_kernels.core.structure import build, flatten
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.storage.nf4 import NestedAbsmax, NF4Weight, quantize_nf4
from peftkit_kernels.storage.quantized import decode, dequantize_reference
from peftkit_kernels.storage.requantized import RequantizedWeight, requantize
from peftkit_kernels.storage.requantized.reference import nest

every_base = pytest.mark.parametrize("name", BASES)
# no update leaves the weight on its grid; a small one moves few codes; a large one moves most
every_size = pytest.mark.parametrize("size", [0.0, 0.03, 1.0])


def linear(x, q, bias, lora, backend="auto"):
    return lora_qkv(x, [q], [bias], [lora], backend=backend)[0]


def decoded_by_bitsandbytes(q):
    if isinstance(q, torch.Tensor):
        return q.float()
    if not isinstance(q, NF4Weight):
        return bnb.int8_vectorwise_dequant(q.codes, q.row_absmax)
    inner = q.nested and bnb.QuantState(
        q.nested.absmax, None, q.nested.code, 256, None, torch.float32
    )
    state = bnb.QuantState(
        q.absmax,
        torch.Size(q.shape),
        bnb.get_4bit_type("nf4", device="cpu"),
        q.blocksize,
        "nf4",
        torch.float32,
        q.nested and q.nested.offset,
        inner,
    )
    return bnb.dequantize_4bit(q.packed.view(-1, 1), state)


@every_size
@every_base
def test_stores_what_bitsandbytes_stores(name, size):
    q, lora = case(name, size)
    merged = decoded_by_bitsandbytes(q.base) + (lora.B @ lora.A) * lora.scale
    if isinstance(q.base, torch.Tensor):
        merged = merged.to(q.base.dtype)
    found = requantize(q)
    if q.into == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(merged.half())
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.row_absmax, absmax)
        return
    nested = "nested" in name
    packed, state = bnb.quantize_4bit(
        merged, blocksize=q.blocksize, quant_type="nf4", compress_statistics=nested
    )
    assert torch.equal(found.packed, packed.view(-1))
    assert torch.equal(found.absmax, state.absmax)
    assert (found.nested is not None) is nested
    if nested:
        assert torch.equal(found.nested.absmax, state.state2.absmax)
        assert torch.equal(found.nested.offset, state.offset)
        assert torch.equal(found.nested.code, state.state2.code)


def test_without_an_update_a_stored_weight_is_unchanged():
    for name in ("nf4", "nf4, blocks of 32", "int8"):
        q, _ = case(name, 0.0)
        assert torch.equal(decode(q, torch.float32), decode(q.base, torch.float32).clone()), name


def test_nested_maxima_as_bitsandbytes_finds_them():
    """In the middle between two codes too, where its table of 65,536 entries decides."""
    code = quantize_nf4(torch.zeros(4, 64), nested=True).nested.code
    middles = (code[1:] + code[:-1]) / 2
    near = torch.cat([middles + delta for delta in torch.linspace(-4e-5, 4e-5, 33)])
    maxima = torch.cat([torch.tensor([-1.0, 1.0]), near, -near])
    offset = maxima.mean()
    codes, state = bnb.quantize_blockwise(maxima - offset, blocksize=256)
    found, nested = nest(maxima, code, 256, by_table=True)
    assert torch.equal(found, codes)
    assert torch.equal(nested.absmax, state.absmax)
    exact = torch.bucketize((maxima - offset)[:256] / nested.absmax[0], middles)
    assert not torch.equal(found[:256].long(), exact), "no value shows what the table does"


@pytest.mark.parametrize("by_table", [True, False])
def test_equal_nested_maxima_decode_to_their_mean(by_table):
    code = quantize_nf4(torch.zeros(4, 64), nested=True).nested.code
    codes, nested = nest(torch.full((300,), 0.25), code, 256, by_table=by_table)
    assert isinstance(nested, NestedAbsmax)
    assert torch.equal(nested.decode(codes), torch.full((300,), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_size
@every_base
def test_native_code_gives_the_bits_of_the_definition(name, size, dtype, monkeypatch):
    # odd sizes, rows of more than one span, and a factor that is not a power of two
    for N, K, R in ((13, 64, 1), (3, 4096 + 128, 7)):
        q, _ = case(name, size, N, K, R)
        expected = dequantize_reference(q, dtype)
        with monkeypatch.context() as patch:
            calls, run = [], native.merge
            patch.setattr(native, "merge", lambda *a, calls=calls, run=run: calls.append(run(*a)))
            assert torch.equal(decode(q, dtype), expected)
            assert calls == [None]
        with monkeypatch.context() as patch:
            patch.setattr(native, "supports", lambda *tensors: False)
            assert torch.equal(decode(q, dtype), expected)


def test_special_values():
    """Zeros, subnormals, values that float16 rounds to its subnormals, infinities and NaN."""
    W = draw(7, 128) * 1e-6
    W[1], W[2] = 0.0, draw(128, seed=4) * 1e-7
    W[3], W[4, 5], W[5, 6] = draw(128, seed=5) * 30_000, float("nan"), 1e-39
    zero = LoRA(torch.zeros(1, 128), torch.zeros(7, 1), 1.0)
    for into in ("nf4", "int8"):
        q = RequantizedWeight.merging(W, zero, into)
        found, expected = decode(q, torch.float32), dequantize_reference(q, torch.float32)
        good = [0, 1, 2, 3, 5, 6]
        torch.testing.assert_close(found[good], expected[good], rtol=0, atol=0, equal_nan=True)
        assert found[good[:3]].isfinite().all()
        assert found[4, :64].isnan().all()
        assert expected[4, :64].isnan().any()


def test_rounds_to_float16_like_torch():
    """8-bit storage by way of float16: each float16 value, the middles between them, and their neighbours."""
    bits = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (bits[1:] + bits[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 1e9)]
    values = torch.cat([bits, middles, *near])
    # in a row with a maximum of 127 a value is rounded to float16, and that to a code
    row = torch.cat([values[values < 127.0], torch.tensor([127.0])])
    rows = torch.stack([row, -row])[:, -(row.numel() // 64 * 64) :]
    zero = LoRA(torch.zeros(1, rows.shape[1]), torch.zeros(2, 1), 1.0)
    q = RequantizedWeight.merging(rows, zero, "int8")
    assert torch.equal(decode(q, torch.float32), dequantize_reference(q, torch.float32))


@every_base
def test_a_weight_is_rebuilt_from_what_an_op_takes(name):
    q, _ = case(name)
    tensors, _, structure = flatten([q])
    (again,) = build(structure, tensors)
    assert type(again.base) is type(q.base)
    assert (again.scale, again.into, again.blocksize) == (q.scale, q.into, q.blocksize)
    assert torch.equal(decode(again, torch.float32), dequantize_reference(q, torch.float32))


@pytest.mark.parametrize("trained", ["A", "B", "x", "all"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@every_base
def test_gradients_pass_through_the_rounding(name, backend, trained):
    q, lora = case(name, 0.3)
    x, bias = draw(2, 9, 256, seed=3), draw(24, seed=4)
    leaves = {"x": x, "A": lora.A, "B": lora.B}
    needed = leaves if trained == "all" else {trained: leaves[trained]}
    for leaf in needed.values():
        leaf.requires_grad_()
    weight = straight_through(q, lora)
    y = linear(x, q, bias, lora, backend=backend)
    truth = F.linear(x, weight, bias)
    dy = draw(*y.shape, seed=5)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y, list(needed.values()), dy)
    expected = torch.autograd.grad(truth, list(needed.values()), dy)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("merged", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("op", ["qkv", "mlp"])
def test_beside_weights_with_a_separate_update(op, merged, backend):
    run, truth = joined(op, merged)
    for ours, theirs in zip(run(backend), truth, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_step_of_an_optimiser_is_seen_by_the_next_forward():
    q, lora = case("nf4")
    x = draw(3, 256, seed=3)
    before = linear(x, q, None, lora)
    lora.B.add_(1.0)
    assert not torch.equal(linear(x, q, None, lora), before)


def test_factors_that_change_before_the_backward_are_noticed():
    q, lora = case("nf4")
    lora.A.requires_grad_()
    y = linear(draw(3, 256, seed=3).requires_grad_(), q, None, lora)
    with torch.no_grad():
        lora.A.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_16_bit_factors_are_merged_in_float32():
    q, lora = case("nf4", dtype=torch.bfloat16)
    wide = RequantizedWeight(q.base, lora.A.float(), lora.B.float(), q.scale, "nf4")
    assert torch.equal(decode(q, torch.float32), dequantize_reference(wide, torch.float32))


def test_under_autocast_the_merge_is_still_in_float32():
    q, lora = case("nf4, nested")
    x = draw(3, 256, seed=3)
    expected = F.linear(x.bfloat16(), dequantize_reference(q, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, q, None, lora), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"into": "int4"}, r"into='int4' is unknown; use one of nf4, int8"),
        ({"into": "int8"}, r"into='int8', but the base is stored as nf4"),
        ({"B": torch.zeros(24, 4)}, r"do not fit a base \(24, 256\)"),
        ({"A": torch.zeros(5, 256, requires_grad=True)}, "pass detached factors"),
        ({"blocksize": 32}, "blocksize=32, but the base has blocks of 64"),
        (
            {"base": torch.zeros(24, 40), "A": torch.zeros(5, 40)},
            "rows of 40 elements are not whole",
        ),
    ],
)
def test_a_weight_that_cannot_be_stored_is_refused(changes, message):
    q, _ = case("nf4")
    fields = {"base": q.base, "A": q.A, "B": q.B, "scale": 1.0, "into": "nf4"}
    with pytest.raises(ValueError, match=message):
        RequantizedWeight(**fields | changes)


def test_dropout_is_refused():
    lora = LoRA(torch.zeros(2, 64), torch.zeros(4, 2), 1.0, 0.1)
    with pytest.raises(ValueError, match=r"lora.p=0.1: dropout"):
        RequantizedWeight.merging(torch.zeros(4, 64), lora, "nf4")
