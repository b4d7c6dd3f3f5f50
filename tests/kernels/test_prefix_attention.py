"""Attention with a prefix: two merged passes against the joined keys in float64, forward and backward."""

import pytest
import torch
from lora_cases import subsets
from prefix_cases import MASKS, NAMES, SHAPES, check, make, masking, run

from lab.testing import Made, kept_for_backward
from peftkit_kernels import native
from peftkit_kernels.ops.prefix_attention import prefix_attention, prefix_attention_reference

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
gating = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@every_shape
@gating
@pytest.mark.parametrize("kind", MASKS)
def test_within_the_error_bound(shape, kind, gated):
    check(shape, *make(shape, gated=gated), backend="torch", **masking(shape, kind))


@gating
@pytest.mark.parametrize("kind", ["causal", "causal padding"])
@pytest.mark.parametrize(
    ("dtype", "prefix"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=lambda d: str(d)[6:],
)
def test_16_bits(dtype, prefix, kind, gated):
    shape = SHAPES["odd head size"]
    leaves, dout = make(shape, dtype, gated, prefix)
    check(shape, leaves, dout, backend="torch", **masking(shape, kind))
    grads = run(leaves, dout)
    assert grads["prefix_k"].dtype == (prefix or dtype)
    assert grads["q"].dtype == dtype


@gating
@pytest.mark.parametrize("kind", MASKS)
@every_shape
def test_exact_in_float64(shape, kind, gated):
    leaves, dout = make(shape, torch.float64, gated)
    options = masking(shape, kind)
    actual, expected = (
        run(leaves, dout, **options),
        run(leaves, dout, backend="reference", **options),
    )
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@gating
@pytest.mark.parametrize("kind", MASKS)
def test_without_native_passes(kind, gated, monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda: "there is no compiler")
    shape = SHAPES["native, grouped heads, ragged"]
    check(shape, *make(shape, gated=gated), backend="torch", **masking(shape, kind))


@pytest.mark.parametrize("kind", MASKS)
def test_reference_is_the_formula(kind):
    shape = (2, 4, 2, 3, 3, 2, 2)
    leaves, _ = make(shape, torch.float64, gated=True)
    options = masking(shape, kind)
    q, k, v, prefix_k, prefix_v = (leaves[name].detach() for name in NAMES)
    for b in range(2):
        for h in range(4):
            keys = torch.cat([prefix_k[h // 2], k[b, h // 2]])
            values = torch.cat([prefix_v[h // 2], v[b, h // 2]])
            for i in range(3):
                seen = options["mask"][b, 0, i] if "mask" in options else torch.ones(3).bool()
                if "causal" in options:
                    seen = seen & (torch.arange(3) <= i)
                seen = torch.cat([torch.ones(2).bool(), seen])
                weights = (keys[seen] @ q[b, h, i] * 0.7).softmax(0)
                out = prefix_attention_reference(q, k, v, prefix_k, prefix_v, 0.7, **options)
                torch.testing.assert_close(out[b, i, h], weights @ values[seen])


@gating
@pytest.mark.parametrize("kind", ["causal", "padding"])
def test_gradients_of_the_reference(kind, gated):
    shape = (2, 4, 2, 3, 3, 2, 2)
    leaves, _ = make(shape, torch.float64, gated)

    def op(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        parts = (named[name] for name in NAMES)
        return prefix_attention(
            *parts, 0.7, gate=named.get("gate"), backend="reference", **masking(shape, kind)
        )

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("trained", subsets(("q", "k", "prefix_k", "gate")), ids="-".join)
def test_each_subset_of_trained_tensors(trained):
    shape = SHAPES["native"]
    leaves, dout = make(shape, gated=True, trained=trained)
    every, _ = make(shape, gated=True)
    expected, actual = run(every, dout, causal=True), run(leaves, dout, causal=True)
    assert actual.keys() == {"out", *trained}
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_a_gate_of_zero_changes_nothing_and_learns():
    from peftkit_kernels.ops.attention import attention

    leaves, dout = make(SHAPES["native"], gated=True)
    with torch.no_grad():
        leaves["gate"].zero_()
    results = run(leaves, dout, causal=True)
    plain = attention(*(leaves[name] for name in "qkv"), 32**-0.5, causal=True)
    assert torch.equal(results["out"], plain)
    assert results["gate"].abs().min() > 0
    assert not results["prefix_v"].any()


@gating
def test_queries_that_see_no_key_get_the_prefix(gated):
    shape = (1, 2, 2, 8, 8, 3, 32)
    leaves, dout = make(shape, gated=gated)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5] = False
    results = run(leaves, dout, mask=mask)
    weights = (leaves["q"][0] @ leaves["prefix_k"].mT * 32**-0.5).softmax(-1)
    expected = (weights @ leaves["prefix_v"]).transpose(0, 1)[2:5]
    expected = expected * leaves["gate"][:, None] if gated else expected
    torch.testing.assert_close(results["out"][0, 2:5], expected)
    assert all(value.isfinite().all() for value in results.values())


@gating
@pytest.mark.parametrize("shape", [SHAPES["native"], SHAPES["odd head size"]], ids=str)
def test_keeps_what_the_readme_says(shape, gated):
    B, H, _, S, _, _, D = shape
    leaves, _ = make(shape, gated=gated)
    with kept_for_backward(*leaves.values()) as kept:
        out = prefix_attention(
            *(leaves[name] for name in NAMES), 0.3, causal=True, gate=leaves.get("gate")
        )
    assert out.requires_grad
    outputs = 2 if gated and D % 32 else 1  # the native pass makes the parts again
    assert kept.total_bytes == 4 * (outputs * B * S * H * D + (1 + gated) * B * H * S)


def test_the_cache_is_not_copied():
    shape = (1, 4, 2, 1, 2048, 16, 32)
    leaves, _ = make(shape, trained=())
    with Made(*leaves.values()) as made:
        prefix_attention(*(leaves[name] for name in NAMES), 0.3)
    # the output is the largest
    assert made.largest_bytes == 4 * 4 * 32


def test_modes_and_repetition():
    leaves, dout = make(SHAPES["native"])
    expected = run(leaves, dout, causal=True)
    again = run(leaves, dout, causal=True)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = prefix_attention(*(leaves[name] for name in NAMES), 32**-0.5, causal=True)
        assert torch.equal(out, expected["out"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(leaves, dout, causal=True)
    cast = {n: leaf.detach().bfloat16().requires_grad_() for n, leaf in leaves.items()}
    half = run(cast, dout.bfloat16(), causal=True)
    assert actual["out"].dtype is torch.bfloat16
    assert torch.equal(actual["out"], half["out"])
    assert {actual[name].dtype for name in NAMES} == {torch.float32}


def test_second_derivative_raises():
    leaves, _ = make(SHAPES["native"])
    out = prefix_attention(*(leaves[name] for name in NAMES), 0.3)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="prefix_attention is once_differentiable"):
        dq.sum().backward()


def test_compiled_without_graph_break():
    leaves, dout = make(SHAPES["odd head size"], torch.float64, gated=True)

    def op(q, k, v, prefix_k, prefix_v, gate):
        return prefix_attention(q, k, v, prefix_k, prefix_v, 0.3, causal=True, gate=gate)

    torch.compiler.reset()
    out = torch.compile(op, backend="aot_eager", fullgraph=True)(*leaves.values())
    torch.testing.assert_close(out, op(*leaves.values()))
    assert torch.autograd.grad(out, leaves["gate"], dout)[0].any()


def test_empty_tensors_go_to_the_definition():
    leaves, dout = make((2, 2, 2, 4, 4, 0, 32))
    assert run(leaves, dout)["prefix_k"].shape == (2, 0, 32)
    with pytest.raises(ValueError, match="backend='torch': prefix_k is empty; use backend='auto'"):
        run(leaves, dout, backend="torch")
    leaves, dout = make((2, 2, 2, 0, 4, 3, 32))
    assert run(leaves, dout)["out"].shape == (2, 0, 2, 32)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"k": torch.zeros(2, 3, 64, 32)}, {}, r"q \(2, 2, 64, 32\), k \(2, 3, 64, 32\) and v"),
        (
            {"prefix_k": torch.zeros(2, 16, 31)},
            {},
            r"prefix_k \(2, 16, 31\).* must be \[2, P, 32\]",
        ),
        ({"prefix_v": torch.zeros(2, 15, 32)}, {}, r"prefix_v \(2, 15, 32\) do not fit"),
        ({"prefix_k": torch.zeros(16, 32)}, {}, r"prefix_k \(16, 32\)"),
        ({}, {"mask": torch.zeros(2, 1, 64, 64)}, r"mask is torch.float32 .* must be bool"),
        ({}, {"gate": torch.zeros(3)}, r"gate has shape \(3,\); it must be \[2\]"),
        ({"q": torch.zeros(2, 2, 5, 32)}, {"causal": True}, r"causal=True with 5 queries and 64"),
    ],
)
def test_errors_name_the_argument(change, options, message):
    leaves, _ = make(SHAPES["native"])
    with pytest.raises(ValueError, match=message):
        prefix_attention(*((leaves | change)[name] for name in NAMES), 0.3, **options)
