"""Attention against its definition in float64: outputs, gradients, masks, layouts, refusals."""

import pytest
import torch
from attention_bounds import attention_bounds
from markers import needs_native
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.ops.attention import attention, attention_reference, native_obstacle

SHAPES = {
    "one block": (2, 2, 2, 64, 64, 32),
    "grouped heads, ragged blocks": (2, 6, 2, 130, 130, 64),
    "one query": (1, 2, 1, 1, 5, 32),
    "more keys than queries": (1, 4, 1, 20, 150, 96),
}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as attention modules lay them out (positions before heads), and the gradient of the output."""
    B, H, G, S, T, D = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, S, H, D), (B, T, G, D), (B, T, G, D))
    qkv = [torch.randn(*size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]
    return [*qkv, torch.randn(B, S, H, D, generator=generator).to(dtype)]


def results(run, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def padding_mask(B: int, S: int, T: int, causal: bool) -> Tensor:
    """The last sequence is padded on the left, so that its first queries see nothing."""
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    if causal:
        mask = mask.tril(T - S)
    mask[-1, :, :, : T // 3] = False
    return mask


@needs_native
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "causal padding"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_within_their_bounds(shape, masking):
    B, _, _, S, T, D = shape
    causal = masking == "causal" and S == T
    mask = padding_mask(B, S, T, "causal" in masking) if "padding" in masking else None
    q, k, v, dout = make(shape)
    ours = results(
        lambda *qkv: attention(*qkv, D**-0.5, causal=causal, mask=mask, backend="torch"),
        *(q, k, v, dout),
    )
    visible = torch.ones(B, 1, S, T, dtype=torch.bool) if mask is None else mask
    expected = attention_bounds(
        {"q": q, "k": k, "v": v}, dout, D**-0.5, visible.tril() if causal else visible
    )
    assert len(ours) == len(expected) == 4
    for name, bound in expected.items():
        bound.check(ours[name if name == "out" else "d" + name], name)


@needs_native
def test_blind_queries_give_zero_and_finite_gradients():
    shape = (1, 2, 2, 70, 70, 32)
    q, k, v, dout = make(shape)
    mask = torch.zeros(1, 1, 70, 70, dtype=torch.bool)
    mask[..., 40:, :] = True
    ours = results(lambda *qkv: attention(*qkv, 0.2, mask=mask, backend="torch"), q, k, v, dout)
    assert (ours["out"][:, :40] == 0).all()
    assert (ours["dq"][:, :, :40] == 0).all()
    assert all(torch.isfinite(value).all() for value in ours.values())


@needs_native
def test_a_masked_key_has_no_influence_and_nan_stays_in_its_rows():
    q, k, v, _ = make((1, 1, 1, 64, 64, 32))
    q[0, 0, 5] = torch.nan
    out = attention(q, k, v, 0.2, causal=True, backend="torch")
    assert out[0, 5].isnan().all()
    assert torch.isfinite(out[0, [i for i in range(64) if i != 5]]).all()
    k2, v2 = k.clone(), v.clone()
    k2[0, 0, 63], v2[0, 0, 63] = 1e3, 1e3
    changed = attention(q, k2, v2, 0.2, causal=True, backend="torch")
    assert torch.equal(out[0, 6:63], changed[0, 6:63])


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads_or_repetition(threads):
    q, k, v, dout = make((2, 4, 2, 130, 130, 32))
    first = results(lambda *qkv: attention(*qkv, 0.2, causal=True), q, k, v, dout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = results(lambda *qkv: attention(*qkv, 0.2, causal=True), q, k, v, dout)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_native
def test_keeps_only_its_inputs_the_output_and_one_number_a_row():
    B, H, G, S, T, D = shape = (2, 4, 2, 70, 70, 32)
    q, k, v, _ = (t.requires_grad_() for t in make(shape))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attention(q, k, v, 0.2, causal=True)
    assert out.grad_fn is not None
    assert sum(saved.values()) == 4 * (2 * B * H * S * D + 2 * B * G * T * D + B * H * S)


@needs_native
def test_a_second_backward_through_the_gradient_raises():
    q, k, v, dout = make((1, 2, 2, 64, 64, 32))
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, k, v, 0.2), q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_the_definition_passes_gradcheck():
    q, k, v, _ = (t.requires_grad_() for t in make((1, 2, 1, 3, 4, 2), torch.float64))
    mask = padding_mask(1, 3, 4, causal=True)
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_reference(*qkv, 0.7, mask=mask), (q, k, v)
    )


def test_without_native_passes_the_definition_runs(monkeypatch):
    q, k, v, _ = make((1, 2, 1, 20, 20, 32))
    monkeypatch.setattr(
        native, "obstacle", lambda: "no C compiler (cc, gcc or clang) is on the PATH"
    )
    assert "no C compiler" in (native_obstacle(q, k, v, None) or "")
    expected = attention_reference(q, k, v, 0.2, causal=True)
    assert torch.equal(attention(q, k, v, 0.2, causal=True), expected)
    with pytest.raises(ValueError, match=r"backend='torch'.*no C compiler"):
        attention(q, k, v, 0.2, backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 3, 20, 32)}, "do not fit"),
        ({"k": torch.zeros(1, 1, 21, 32), "v": torch.zeros(1, 1, 21, 32)}, "ambiguous"),
        ({"mask": torch.zeros(1, 1, 20, 20)}, "must be bool"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
    ids=["heads", "causal with more keys", "mask dtype", "backend"],
)
def test_bad_arguments_are_named(change, message):
    q, k, v, _ = make((1, 2, 1, 20, 20, 32))
    arguments = {"q": q, "k": k, "v": v, "scale": 0.2, "causal": True, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("dtype", "size", "sentence"),
    [(torch.float64, 32, "not float32"), (torch.float32, 24, "not a multiple of 32")],
)
def test_obstacles_are_sentences(dtype, size, sentence):
    q, k, v, _ = make((1, 2, 1, 20, 20, size), dtype)
    assert sentence in (native_obstacle(q, k, v, None) or "")
    assert attention(q, k, v, 0.2).shape == (1, 20, 2, size)
