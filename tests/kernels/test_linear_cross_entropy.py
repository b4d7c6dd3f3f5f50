"""The logit-free loss against its definition in float64, and what it may allocate and keep."""

import itertools

import pytest
import torch
from cross_entropy_cases import DTYPES, IGNORE, NAMES, inputs, loss_and_grads

from lab.testing import FEW
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.linear_cross_entropy import (
    RowLoss,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    torch_passes,
)
from peftkit_kernels.ops.linear_cross_entropy.torch_passes import xent_rows_

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "lora": {"lora": True},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.05},
    "scale": {"logit_scale": 0.3},
    "shift": {"shift": True},
    "num_items": {"num_items": 20},
    "one_row_chunks": {"chunk": 1},
    "uneven_chunks": {"chunk": 5, "lora": True},
    "everything": {
        "bias": True,
        "lora": True,
        "softcap": 3.0,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
        "logit_scale": 0.7,
        "shift": True,
        "chunk": 4,
    },
}


def assert_no_worse_than(actual, plain, truth, dtype):
    """Error against float64 within twice that of plain torch computing in ``dtype``, four times for few numbers, and one rounding.

    In float64, where plain torch is the truth itself, within 1e-10 of the size of the result.
    """
    rounding = 1e-10 if dtype is torch.float64 else torch.finfo(dtype).eps
    factor = 4 if truth.numel() < FEW else 2
    allowed = factor * (plain.double() - truth).abs().max() + rounding * truth.abs().max()
    assert truth.abs().max() > 10 * allowed, "inputs too small: a wrong result would pass"
    assert (actual.double() - truth).abs().max() <= allowed


def assert_matches(tensors, target, **options):
    truth = loss_and_grads(
        tensors, target, dtype=torch.float64, backend="reference", **options.copy()
    )
    plain = loss_and_grads(tensors, target, backend="reference", **options.copy())
    actual = loss_and_grads(tensors, target, **options.copy())
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype, name
        assert_no_worse_than(value, plain[name], truth[name], tensors["hidden"].dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_torchs_cross_entropy(reduction, smoothing):
    tensors, target = inputs()
    hidden, weight = tensors["hidden"], tensors["weight"]
    ours = linear_cross_entropy_reference(
        hidden, weight, target, reduction=reduction, row_loss=RowLoss(label_smoothing=smoothing)
    )
    torchs = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1),
        target.flatten(),
        reduction=reduction,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(ours, torchs.view_as(ours), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_pass_gradcheck(backend, reduction):
    tensors, target = inputs(shape=(5,), V=7, D=4, R=2)

    def loss(hidden, weight, bias, A, B):
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            lora=LoRA(A, B, 0.5),
            softcap=3.0,
            label_smoothing=0.1,
            z_loss=0.05,
            logit_scale=0.7,
            reduction=reduction,
            chunk=2,
            backend=backend,
        )

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_definition(option, reduction, dtype):
    options = dict(OPTIONS[option])
    if reduction != "mean":
        options.pop("num_items", None)
    assert_matches(*inputs(dtype), reduction=reduction, **options)


def test_casts_in_many_tiles(monkeypatch):
    monkeypatch.setattr(torch_passes, "_TILE_BYTES", 2**10)
    assert_matches(*inputs(torch.bfloat16), **OPTIONS["everything"])


def test_shift_pairs_each_row_with_the_next_target():
    tensors, target = inputs()
    hidden, weight = tensors["hidden"], tensors["weight"]
    expected = torch.nn.functional.cross_entropy(
        (hidden[:, :-1] @ weight.T).flatten(0, 1), target[:, 1:].flatten()
    )
    for backend in ("reference", "torch"):
        loss = linear_cross_entropy(hidden, weight, target, shift=True, backend=backend)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float32_factors_on_a_16_bit_head(dtype, reduction):
    tensors, target = inputs(dtype, factors=torch.float32)
    assert_matches(tensors, target, lora=True, reduction=reduction)
    grads = loss_and_grads(tensors, target, lora=True, reduction=reduction)
    assert grads["A"].dtype == grads["B"].dtype == torch.float32


@pytest.mark.parametrize("M", [1, 3, 17, 65])
def test_any_number_of_rows(M):
    tensors, target = inputs(torch.float32, shape=(M,), V=101, D=7, R=1)
    target[0] = 5
    assert_matches(tensors, target, bias=True, lora=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    tensors, target = inputs(torch.float32, shape=(0,))
    result = loss_and_grads(tensors, target, bias=True, lora=True, reduction=reduction)
    loss = result.pop("loss")
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert result.keys() == set(NAMES)
    for name, grad in result.items():
        assert grad.shape == tensors[name].shape
        assert not grad.any(), name


def torch_cross_entropy(hidden, weight, target, *, bias, lora, backend, num_items=None, **options):
    """``linear_cross_entropy`` as torch computes it from all logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits + lora.scale * hidden @ lora.A.t() @ lora.B.t()
    rows, target = logits.flatten(0, -2), target.flatten()
    loss = torch.nn.functional.cross_entropy(rows, target, ignore_index=IGNORE, **options)
    return loss if num_items is None else loss / num_items


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"reduction": "mean"}, {"reduction": "mean"}),
        ({"reduction": "sum"}, {"reduction": "sum"}),
        ({"reduction": "none"}, {"reduction": "none"}),
        ({"num_items": 5}, {"reduction": "sum", "num_items": 5}),
        ({"num_items": 0}, {"reduction": "sum", "num_items": 0}),
        ({"num_items": torch.tensor(0)}, {"reduction": "sum", "num_items": torch.tensor(0)}),
    ],
    ids=["mean", "sum", "none", "5 items", "0 items", "tensor of 0 items"],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_counted_row(backend, ours, theirs):
    """The mean over nothing is NaN, and no gradient is: exactly as torch's own cross entropy."""
    tensors, target = inputs(torch.float32)
    target = torch.full_like(target, IGNORE)
    expected = loss_and_grads(
        tensors, target, op=torch_cross_entropy, bias=True, lora=True, **theirs
    )
    actual = loss_and_grads(tensors, target, bias=True, lora=True, backend=backend, **ours)
    assert actual.keys() == expected.keys() == {"loss", *NAMES}
    loss = actual.pop("loss").flatten()
    torch.testing.assert_close(loss, expected.pop("loss").flatten(), rtol=0, atol=0, equal_nan=True)
    for name, grad in actual.items():
        assert torch.equal(grad, expected[name]), name
        assert not grad.any(), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_mean_over_zero_items_that_has_counted_rows_is_infinite(backend):
    tensors, target = inputs(torch.float32)
    result = loss_and_grads(tensors, target, bias=True, lora=True, num_items=0, backend=backend)
    assert result["loss"] == torch.inf
    ignored = target == IGNORE
    assert ignored.any()
    assert not result["hidden"][ignored].any()
    assert not result["hidden"][~ignored].isfinite().all()


def test_a_single_row_without_leading_axis():
    tensors, _ = inputs(shape=())
    loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], torch.tensor(4))
    expected = torch.nn.functional.cross_entropy(
        tensors["weight"] @ tensors["hidden"], torch.tensor(4)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)


def test_strided_hidden_and_weight():
    tensors, target = inputs(torch.float32)
    strided = {
        **tensors,
        "hidden": tensors["hidden"].detach().mT.contiguous().mT.requires_grad_(),
        "weight": tensors["weight"].detach().T.contiguous().T.requires_grad_(),
    }
    assert not strided["hidden"].is_contiguous()
    assert_matches(strided, target, lora=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_subset_of_trained_tensors(reduction):
    every = loss_and_grads(*inputs(), bias=True, lora=True, reduction=reduction)
    for size in range(1, 6):
        for subset in itertools.combinations(NAMES, size):
            some = loss_and_grads(*inputs(grad=subset), bias=True, lora=True, reduction=reduction)
            assert some.keys() == {"loss", *subset}
            for name, value in some.items():
                torch.testing.assert_close(value, every[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_only(bad):
    tensors, target = inputs(torch.float32, shape=(9,), grad=("hidden",))
    with torch.no_grad():
        tensors["hidden"][2, 1] = bad
    result = loss_and_grads(tensors, target, reduction="none")
    broken = torch.arange(9) == 2
    assert torch.equal(~result["loss"].isfinite(), broken)
    assert torch.equal(~result["hidden"].isfinite().all(1), broken)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_of_a_chunk(dtype):
    """On a GPU ignored rows are computed and masked; the pass itself runs anywhere."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 31, generator=generator, dtype=torch.float64).to(dtype)
    z[4] = float("nan")
    target = torch.randint(0, 31, (6,), generator=generator)
    ignored = torch.tensor([False, True, False, False, True, False])
    row_loss = RowLoss(0.7, 3.0, 0.1, 0.05)

    kept = z[~ignored].clone()
    kept_loss, kept_lse = xent_rows_(kept, target[~ignored], row_loss, ignored=None, want_grad=True)
    loss, lse = xent_rows_(z, target, row_loss, ignored=ignored, want_grad=True)
    assert torch.equal(loss[~ignored], kept_loss)
    assert torch.equal(lse[~ignored], kept_lse)
    assert torch.equal(z[~ignored], kept)
    assert not loss[ignored].any()
    assert not z[ignored].any()


@pytest.mark.parametrize("tile_bytes", [2**24, 2**10], ids=["one tile", "many tiles"])
def test_float32_products_for_a_16_bit_head(tile_bytes, monkeypatch):
    """Logits that are never rounded to 16 bits give the loss to float32 accuracy."""
    monkeypatch.setattr(torch_passes, "_TILE_BYTES", tile_bytes)
    tensors, target = inputs(torch.bfloat16)
    truth = loss_and_grads(tensors, target, dtype=torch.float64, backend="reference", lora=True)
    options = {"compute_dtype": torch.float32, "lora": True}
    plain = loss_and_grads(tensors, target, backend="reference", **options.copy())
    actual = loss_and_grads(tensors, target, **options.copy())
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], truth[name], value.dtype)
    assert (actual["loss"] - truth["loss"]).abs() < torch.finfo(torch.bfloat16).eps / 1000


def test_autocast_computes_in_its_dtype():
    tensors, target = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_and_grads(tensors, target, bias=True, lora=True)
    explicit = loss_and_grads(tensors, target, bias=True, lora=True, compute_dtype=torch.bfloat16)
    for name, value in cast.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, explicit[name]), name


def test_without_gradients_the_loss_is_the_same():
    tensors, target = inputs(torch.float32)
    options = {"softcap": 3.0, "label_smoothing": 0.1}
    with_grad = linear_cross_entropy(tensors["hidden"], tensors["weight"], target, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], target, **options)
        assert not loss.requires_grad
        assert torch.equal(loss, with_grad)


def test_compiled_without_graph_break():
    tensors, target = inputs(grad=("hidden", "A", "B"))

    def loss(tensors):
        lora = LoRA(tensors["A"], tensors["B"], 0.5)
        return linear_cross_entropy(
            tensors["hidden"], tensors["weight"], target, lora=lora, shift=True
        )

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(tensors), [tensors[n] for n in ("hidden", "A", "B")])
    actual = torch.autograd.grad(compiled(tensors), [tensors[n] for n in ("hidden", "A", "B")])
    torch.testing.assert_close(compiled(tensors), loss(tensors), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight_of_loss", [1.0, "trained"])
def test_second_derivative_raises(weight_of_loss):
    """Also where only the gradient's own dependence on the hidden states is asked for."""
    tensors, target = inputs()
    loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], target)
    if weight_of_loss == "trained":
        loss = loss * torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, tensors["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy .* no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backward_passes_and_two_runs_give_the_same_bits(reduction):
    tensors, target = inputs(torch.float32, shape=(65,), V=307)
    leaves = list(tensors.values())
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(
            tensors["hidden"],
            tensors["weight"],
            target,
            bias=tensors["bias"],
            lora=LoRA(tensors["A"], tensors["B"], 0.5),
            chunk=16,
            reduction=reduction,
        ).sum()
        for _ in range(2):
            grads = torch.autograd.grad(loss, leaves, retain_graph=True)
            runs.append((loss.detach(), *grads))
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first, other)


def test_num_items_may_be_a_tensor():
    tensors, target = inputs()
    expected = linear_cross_entropy(tensors["hidden"], tensors["weight"], target, num_items=7)
    for count in (torch.tensor(7), torch.tensor(7.0)):
        loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], target, num_items=count)
        assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(53, 23)}, r"weight has shape \(53, 23\)"),
        ({"target": torch.zeros(3, 20, dtype=torch.long)}, r"target has shape \(3, 20\)"),
        ({"target": torch.zeros(3, 21, dtype=torch.int32)}, r"target is torch.int32"),
        ({"target": torch.full((3, 21), 53)}, r"target contains 53, outside \[0, 53\)"),
        ({"target": torch.full((3, 21), -1)}, r"target contains -1"),
        ({"bias": torch.zeros(54)}, r"bias has shape \(54,\)"),
        ({"lora": LoRA(torch.zeros(3, 24), torch.zeros(53, 4), 1.0)}, r"lora: A \(3, 24\)"),
        ({"lora": LoRA(torch.zeros(3, 24), torch.zeros(53, 3), 1.0, 0.1)}, r"lora.p=0.1"),
        ({"reduction": "max"}, r"reduction='max'"),
        ({"reduction": "sum", "num_items": 3}, r"num_items divides the mean"),
        ({"softcap": 0.0}, r"softcap=0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0"),
        ({"chunk": 0}, r"chunk=0"),
        ({"backend": "triton"}, r"backend='triton'"),
    ],
)
def test_errors_name_the_argument(change, message):
    tensors, target = inputs()
    arguments = {"hidden": tensors["hidden"], "weight": tensors["weight"], "target": target}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
