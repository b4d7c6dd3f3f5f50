"""``nf4_linear`` and ``int8_linear``: results within their error bounds, and a decoded weight that nobody keeps."""

import pytest
import torch
from lora_cases import (
    DTYPES,
    LAYOUTS,
    MIXED,
    Linear,
    Projection,
    Shape,
    draw,
    gradients,
    input_grad,
    subsets,
)

from lab.testing import Bound, Made, kept_for_backward
from peftkit_kernels.core import workspace
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.quantized_linear import int8_linear, nf4_linear
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import decode, dequantize_reference

N = 29
TRAINED = ("x", "bias", "A", "B")
STORAGES = {
    "nf4": (nf4_linear, quantize_nf4),
    "nf4_nested": (nf4_linear, lambda w: quantize_nf4(w, 128, nested=True)),
    "int8": (int8_linear, quantize_int8),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


def make(storage, **options):
    """The op, ``x``, the stored weight, and the projection with the weight it decodes to."""
    case = Shape(**options)
    x, part = case.input(), case.projection(N, case.x[-1])
    op, quantize = STORAGES[storage]
    q = quantize(part.weight.float())
    return op, x, q, Projection(dequantize_reference(q, x.dtype), part.bias, part.lora)


def leaves_of(x, part):
    return {"x": x, **{name: t for name, t in part.tensors().items() if name != "weight"}}


def run(op, x, q, part, dy, **options):
    y = op(x, q, part.bias, part.lora, **options)
    results = {"y": y.detach()}
    return results | (gradients(y, dy, leaves_of(x, part)) if y.requires_grad else {})


def check(case, dy_layout="contiguous", **options):
    op, x, q, part = case
    generator = torch.Generator().manual_seed(1)
    dy = draw((*x.shape[:-1], N), x.dtype, generator, dy_layout)
    results = run(op, x, q, part, dy, **options)
    linear = Linear(Bound.of(x.reshape(-1, x.shape[-1])), part, x.dtype)
    rows = Bound.of(dy.reshape(-1, N))
    expected = {"y": linear.forward().reshape(*dy.shape), **linear.backward(rows)}
    expected["x"] = input_grad([linear], [rows]).reshape(*x.shape)
    for name, value in results.items():
        assert value.dtype == (part.lora.A.dtype if name in "AB" else x.dtype)
        expected[name].check(value, name)
    return set(results)


@every_storage
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("dtype", "factors"), [*((d, None) for d in DTYPES), *MIXED], ids=lambda d: str(d)[6:]
)
def test_within_the_error_bound(storage, dtype, factors, p):
    case = make(storage, x=(17, 33), dtype=dtype, factors=factors, p=p)
    assert check(case) == {"y", *TRAINED}


@every_storage
@pytest.mark.parametrize("rank", [0, 1, 24])
@pytest.mark.parametrize("rows", [0, 1, 3, 65])
def test_any_number_of_rows_and_rank(storage, rows, rank):
    case = make(storage, x=(rows, 31), rank=rank)
    assert check(case) == {"y", "x", "bias"} | ({"A", "B"} if rank else set())
    assert "bias" not in check(make(storage, x=(rows, 31), rank=rank, bias=False))


@every_storage
@pytest.mark.parametrize("K", [1, 7, 64, 301])
def test_any_width(storage, K):
    assert len(check(make(storage, x=(17, K)))) == 5


@every_storage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(storage, layout):
    assert len(check(make(storage, x=(2, 5, 33), layout=layout, p=0.1), layout)) == 5


@every_storage
@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_each_subset_of_trained_tensors(storage, trained):
    assert check(make(storage, trained=trained)) == {"y", *trained}


@every_storage
@pytest.mark.parametrize("trained", subsets(TRAINED), ids="-".join)
def test_keeps_what_the_readme_says(storage, trained):
    op, x, q, part = make(storage, x=(17, 33), trained=trained)
    with kept_for_backward(*leaves_of(x.clone(), part).values(), *q.tensors()) as kept:
        y = op(x, q, part.bias, part.lora)
    assert y.requires_grad
    assert kept.total_bytes == 4 * 17 * (33 * ("A" in trained) + 4 * ("B" in trained))


@every_storage
def test_gradients_of_the_reference(storage):
    op, x, q, part = make(storage, x=(3, 5), rank=2, dtype=torch.float64, p=0.3)

    def apply(x, bias, A, B):
        lora = LoRA(A, B, *part.lora.numbers())
        return op(x, q, bias, lora, backend="reference")

    assert torch.autograd.gradcheck(apply, (x, part.bias, part.lora.A, part.lora.B))


@every_storage
def test_layers_share_one_buffer(storage):
    workspace.release()
    op, x, q, part = make(storage, x=(17, 33))
    _, wide, larger, other = make(storage, x=(17, 301))
    address = decode(larger, torch.float32).data_ptr()
    y = op(wide, larger, other.bias, other.lora)
    z = op(x, q, part.bias, part.lora)
    # the second layer has overwritten what the first decoded: its gradient has to be right all the same
    dy = torch.ones(17, N)
    actual = torch.autograd.grad(y, wide, dy)[0]
    expected = op(wide, larger, other.bias, other.lora, backend="reference")
    torch.testing.assert_close(actual, torch.autograd.grad(expected, wide, dy)[0])
    assert z.isfinite().all()
    assert decode(q, torch.float32).data_ptr() == address
    workspace.release()


@every_storage
def test_nothing_of_the_size_of_the_weight_is_made_but_the_workspace(storage):
    workspace.release()
    op, x, q, part = make(storage, x=(3, 2048), rank=2)
    decode(q, torch.float32)
    with Made() as made:
        op(x, q, part.bias, part.lora).sum().backward()
    # codes are read as they lie; with one byte an element they are a quarter of that
    big = [size for size in made.storages.values() if size >= 4 * N * 2048]
    assert big == [4 * N * 2048]
    workspace.release()


def test_threads_have_their_own_buffers():
    import threading

    def address():
        return workspace.take((4, 4), torch.float32, torch.device("cpu")).data_ptr()

    mine, others = address(), []
    thread = threading.Thread(target=lambda: others.append(address()))
    thread.start()
    thread.join()
    assert address() == mine != others[0]


def test_a_buffer_made_in_inference_mode_serves_training_later():
    workspace.release()
    op, x, q, _ = make("nf4")
    with torch.inference_mode():
        op(x, q)
    assert torch.autograd.grad(op(x, q).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("op", "q", "message"),
    [
        (
            nf4_linear,
            quantize_int8(torch.ones(N, 33)),
            "q is a Int8Weight; it must be of type NF4Weight",
        ),
        (
            int8_linear,
            quantize_nf4(torch.ones(N, 33)),
            "q is a NF4Weight; it must be of type Int8Weight",
        ),
        (nf4_linear, quantize_nf4(torch.ones(N, 32)), r"q has shape \(29, 32\) and x \(3, 33\)"),
        (nf4_linear, quantize_nf4(torch.ones(N)), r"q has shape \(29,\)"),
    ],
)
def test_errors_name_the_weight(op, q, message):
    with pytest.raises(ValueError, match=message):
        op(torch.zeros(3, 33), q)


def test_errors_name_the_other_arguments():
    q = quantize_int8(torch.ones(N, 33))
    with pytest.raises(ValueError, match=r"bias has shape \(28,\); .* must be \[29\]"):
        int8_linear(torch.zeros(3, 33), q, torch.zeros(28))
    lora = LoRA(torch.zeros(4, 32), torch.zeros(N, 4), 1.0)
    with pytest.raises(ValueError, match=r"lora: A \(4, 32\) .* must be \[R, 33\]"):
        int8_linear(torch.zeros(3, 33), q, None, lora)
