"""``lora_decoder_layer`` on Triton against its definition in float64, in units of the error of the definition in its own dtype."""

from dataclasses import replace

import pytest
import torch
from triton_cases import assert_same_bits_in_any_order, watched

from lab.testing import kept_for_backward
from peftkit_kernels.core.plan import Plans
from peftkit_kernels.core.structure import encode
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.frozen_norm import rms_norm_reference
from peftkit_kernels.ops.lora_decoder_layer import Norm, lora_decoder_layer, passes
from peftkit_kernels.ops.lora_decoder_layer import schedule as steps
from peftkit_kernels.ops.lora_decoder_layer.reference import rotated
from peftkit_kernels.ops.lora_linear import triton_passes
from peftkit_kernels.ops.lora_linear.schedule import Linear
from peftkit_kernels.storage.fp8 import quantize_fp8
from peftkit_kernels.storage.int8 import Int8ComputeWeight, quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import dense_reference

B, S, D, F, R = 2, 19, 32, 48, 4
HEADS, KEY_HEADS, HEAD_SIZE = 4, 2, 16
INNER, KEYS = HEADS * HEAD_SIZE, KEY_HEADS * HEAD_SIZE
SHAPES = ((INNER, D), (KEYS, D), (KEYS, D), (D, INNER), (F, D), (F, D), (D, F))


def make(
    dtype=torch.float32,
    adapted=range(7),
    bias=True,
    p=0.0,
    factors=None,
    batch=B,
    act="silu",
    offset=0.0,
    of_heads=False,
):
    """Arguments of a layer by name; every number is exact in ``dtype``."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, scale=1.0, to=dtype):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(to)

    loras = [
        LoRA(
            draw(R, shape[1], scale=0.3, to=factors or dtype).requires_grad_(),
            draw(shape[0], R, scale=0.3, to=factors or dtype).requires_grad_(),
            *(2.0, p, 7 + i if p else 0),
        )
        if i in adapted
        else None
        for i, shape in enumerate(SHAPES)
    ]
    return {
        "x": draw(batch, S, D).requires_grad_(),
        "cos": draw(1, S, HEAD_SIZE),
        "sin": draw(batch, S, HEAD_SIZE),
        "norms": [
            Norm(draw(width, scale=0.1) + (1 - offset), 1e-5, offset, not offset)
            for width in (D, D, *[HEAD_SIZE] * 2 * of_heads)
        ],
        "weights": [draw(*shape, scale=0.2) for shape in SHAPES],
        "biases": [draw(shape[0], scale=0.1) if bias else None for shape in SHAPES],
        "loras": loras,
        "act": act,
        "scale": HEAD_SIZE**-0.5,
    }


def wide(arguments):
    """The same numbers in float64."""

    def cast(t):
        return t if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return arguments | {
        **{name: cast(arguments[name]) for name in ("x", "cos", "sin")},
        "norms": [norm._replace(weight=cast(norm.weight)) for norm in arguments["norms"]],
        "weights": [cast(t) for t in arguments["weights"]],
        "biases": [cast(t) for t in arguments["biases"]],
        "loras": [
            lora and replace(lora, A=cast(lora.A), B=cast(lora.B)) for lora in arguments["loras"]
        ],
    }


def run(arguments, backend, all_outputs=True):
    """Outputs and gradients."""
    outputs = lora_decoder_layer(**arguments, backend=backend)
    used = outputs if all_outputs else outputs[:1]
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in used]
    present = [lora for lora in arguments["loras"] if lora is not None]
    leaves = [arguments["x"], *(t for lora in present for t in (lora.A, lora.B))]
    return [*outputs, *torch.autograd.grad(used, leaves, grads)]


def distances(found, expected):
    return [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
    ]


FACTOR = 4.0
"""As in the lab: the backward of flash attention recomputes probabilities from rounded numbers, which costs up to three times the error."""

CASES = {
    "all": {},
    "no bias, q and v": {"bias": False, "adapted": (0, 2)},
    "k, o and down": {"adapted": (1, 3, 6)},
    "none": {"adapted": ()},
    "dropout": {"p": 0.3},
    "gelu, offset": {"act": "gelu_tanh", "offset": 1.0},
    "one sequence": {"batch": 1},
    "norms of heads": {"of_heads": True},
    "norms of heads, offset": {"of_heads": True, "offset": 1.0, "adapted": (1, 2)},
}


@pytest.mark.parametrize("all_outputs", [True, False], ids=["y, k, v", "y"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_the_definition(case, dtype, all_outputs):
    arguments = make(dtype, **CASES[case])
    expected = [t.detach() for t in run(wide(arguments), "reference", all_outputs)]
    plain = distances(run(arguments, "reference", all_outputs), expected)
    with watched():
        own = distances(run(arguments, "triton", all_outputs), expected)
    for i, (ours, theirs) in enumerate(zip(own, plain, strict=True)):
        assert ours <= FACTOR * theirs + 1e-7, (i, ours, theirs)


def test_float32_factors_on_a_16_bit_input():
    arguments = make(torch.bfloat16, factors=torch.float32)
    expected = [t.detach() for t in run(wide(arguments), "reference")]
    with watched():
        own = distances(run(arguments, "triton"), expected)
    plain = distances(run(arguments, "torch"), expected)
    for ours, theirs in zip(own, plain, strict=True):
        assert ours <= FACTOR * theirs + 1e-7


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("remake", ["gate", "most"])
@pytest.mark.parametrize("case", ["all", "none", "dropout", "k, o and down", "norms of heads"])
def test_what_is_made_again_has_the_same_bits(case, remake, backend):
    arguments = make(torch.bfloat16, **CASES[case])
    kept = run(arguments, backend)
    for again, expected in zip(run(arguments | {"remake": remake}, backend), kept, strict=True):
        assert torch.equal(again, expected)


def test_quantised_weights_are_made_again():
    arguments = make(torch.bfloat16)
    arguments["weights"] = [quantize_nf4(w, 32) for w in arguments["weights"]]
    results = [run(arguments | {"remake": remake}, "triton") for remake in ("", "gate", "most")]
    for ours, theirs, expected in zip(*results[1:], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
        assert torch.equal(theirs, expected)


def test_bytes_that_are_kept_are_those_of_the_readme():
    arguments = make(torch.bfloat16, bias=False)
    rows, factors = B * S, [t for lora in arguments["loras"] for t in (lora.A, lora.B)]
    fixed = [*arguments["weights"], *(norm.weight for norm in arguments["norms"]), *factors]
    small = rows * (7 * R * 2 + 2 * 4 + HEADS * 4)  # each s, two norms, flash's log-sum-exp
    always = small + 2 * rows * (2 * D + INNER)  # x, x' and the attention's output
    found = {}
    for remake in ("", "gate", "most"):
        x = arguments["x"].detach().clone().requires_grad_()
        with kept_for_backward(*fixed, arguments["cos"], arguments["sin"]) as kept:
            outputs = lora_decoder_layer(**arguments | {"x": x}, remake=remake, backend="triton")
        assert outputs[0].requires_grad
        found[remake] = kept.total_bytes
    heads = 2 * rows * (INNER + 2 * KEYS)
    assert found == {
        "": always + heads + 2 * rows * 2 * F,
        "gate": always + heads + 2 * rows * F,
        "most": always,
    }


@pytest.mark.parametrize("storage", ["nf4", "int8", "mixed"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_quantised_weights_give_what_their_decoded_values_give(monkeypatch, backend, storage):
    # both alike: by a product that adds the update, and with a decode before the product
    monkeypatch.setattr(triton_passes, "fuses_gemm", lambda *a, **k: False)
    monkeypatch.setattr(triton_passes, "decodes_in_product", lambda *a: False)
    arguments = make(torch.bfloat16, p=0.3)
    stored: list = [
        quantize_int8(w) if storage == "int8" else quantize_nf4(w, 32) for w in arguments["weights"]
    ]
    if storage == "mixed":
        stored[4] = quantize_int8(arguments["weights"][4])
        stored[1] = stored[5] = None
    weights = [
        dense if q is None else q for q, dense in zip(stored, arguments["weights"], strict=True)
    ]
    decoded = [dense_reference(weight, torch.bfloat16) for weight in weights]
    if storage != "mixed":
        # a decoded pair shares a buffer, so one product computes gate and up
        decoded[4:6] = torch.cat(decoded[4:6]).split(F)
    found = run(arguments | {"weights": weights}, backend)
    expected = run(arguments | {"weights": decoded}, backend)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def assert_near_in_codes(found, arguments):
    """``found`` differs from the definition by less than what rounding the inputs to codes changes.

    A norm that sums in another order changes the codes at a border by a step; torch's norm is that of the definition.
    """
    exact = [t.double() for t in run(arguments, "reference")]
    decoded = arguments | {
        "weights": [dense_reference(w, torch.float32) for w in arguments["weights"]]
    }
    rounding = distances(run(decoded, "reference"), exact)
    plain = distances(run(arguments, "torch"), exact)
    for ours, theirs, codes in zip(distances(found, exact), plain, rounding, strict=True):
        assert ours <= FACTOR * theirs + codes


@pytest.mark.parametrize("threshold", [None, 1.5])
def test_products_in_8_bits(threshold):
    """Forward in 8 bits, backward with decoded weights; both as the torch backend, up to codes that differ by one step."""
    arguments = make(torch.bfloat16)
    arguments["weights"] = [
        Int8ComputeWeight(*quantize_int8(w).tensors(), threshold) for w in arguments["weights"]
    ]
    with watched() as traffic:
        own = run(arguments, "triton")
    names = [launch.kernel for launch in traffic.launches]
    assert names.count("int8_gemm_kernel") == 7
    # the inputs of q, k and v; of o; of gate and up; of down
    assert names.count("quantize_kernel") == 4
    assert names.count("list_columns_kernel") == (0 if threshold is None else 4)
    assert names.count("dequantize_kernel") == 7
    assert_near_in_codes(own, arguments)


def test_products_in_float8():
    """Both directions in float8, as the torch backend, up to codes that differ by one step."""
    arguments = make(torch.bfloat16)
    arguments["weights"] = [quantize_fp8(w) for w in arguments["weights"]]
    with watched() as traffic:
        own = run(arguments, "triton")
    names = [launch.kernel for launch in traffic.launches]
    # the inputs of q, k and v; of o; of gate and up; of down; and seven gradients
    assert names.count("quantize_kernel") == 4 + 7
    assert "dequantize_kernel" not in names
    assert_near_in_codes(own, arguments)


def test_quantised_weights_are_decoded_once_each_way():
    arguments = make(torch.bfloat16)
    arguments["weights"] = [quantize_nf4(w, 32) for w in arguments["weights"]]
    with watched() as traffic:
        run(arguments, "triton")
    names = [launch.kernel for launch in traffic.launches]
    assert names.count("dequantize_kernel") == 14


def test_a_replayed_plan_equals_the_schedule_for_other_values(monkeypatch):
    arguments = make(p=0.3)
    run(arguments, "triton")
    tensors = [arguments["x"], arguments["cos"], arguments["sin"], *arguments["weights"]]
    tensors += [t for lora in arguments["loras"] for t in (lora.A, lora.B)]
    for i, t in enumerate(tensors):
        t.data = torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    seeded = [replace(lora, seed=lora.seed + 90) for lora in arguments["loras"]]
    arguments = arguments | {"loras": seeded}
    with monkeypatch.context() as patched:
        patched.setattr(Plans, "_record", None)
        replayed = run(arguments, "triton")
    monkeypatch.setattr(Plans, "__call__", lambda self, *args: self._schedule(*args))
    for found, expected in zip(replayed, run(arguments, "triton"), strict=True):
        assert torch.equal(found, expected)


def test_only_the_gradients_that_are_asked_for():
    arguments = make()
    loras = arguments["loras"]
    for lora in loras[1:]:
        lora.A.requires_grad_(False)
        lora.B.requires_grad_(False)
    (y, _, _) = lora_decoder_layer(**arguments, backend="triton")
    (dB,) = torch.autograd.grad(y.sum(), [loras[0].B], retain_graph=True)
    dx, dA = torch.autograd.grad(y.sum(), [arguments["x"], loras[0].A])
    (y, _, _) = lora_decoder_layer(**arguments, backend="reference")
    expected = torch.autograd.grad(y.sum(), [arguments["x"], loras[0].A, loras[0].B])
    assert max(distances((dx, dA, dB), [t.double() for t in expected])) < 1e-5


def test_results_do_not_depend_on_the_order_of_programs():
    arguments = make(p=0.3)
    assert_same_bits_in_any_order(lambda: run(arguments, "triton"))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("head_size", [16, 20, 128])
def test_the_rotation_in_place_and_its_transpose(head_size, inverse):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 70, heads * head_size, generator=generator) for heads in (3, 1))
    cos, sin = (torch.randn(n, 70, head_size, generator=generator) for n in (1, 2))

    def heads_of(t):
        return t.unflatten(-1, (-1, head_size)).transpose(1, 2)

    expected = []
    for t in (q, k):
        t = t.clone().requires_grad_()
        y = rotated(heads_of(t), cos, sin)
        if inverse:
            (y,) = torch.autograd.grad(y, t, heads_of(t))
            y = heads_of(y)
        expected.append(y.detach())
    with watched(int32_limit=5000):
        (passes.rotate_back_ if inverse else passes.rotate)(q, k, cos, sin)
    for found, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(heads_of(found), wanted)


@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False), (0.5, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [16, 20, 128])
def test_norms_of_heads_before_the_rotation_and_their_gradient(
    head_size, dtype, offset, round_first
):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    # rows of more than their heads, as in a joint projection
    raw = [draw(2, 70, n * head_size + 8)[..., : n * head_size] for n in (3, 1)]
    grads = [draw(2, 70, n * head_size) for n in (3, 1)]
    cos, sin, weights = draw(1, 70, head_size), draw(2, 70, head_size), draw(2, head_size)
    expected, plain = [], []
    for wide, found in ((torch.float64, expected), (dtype, plain)):
        for t, grad, weight in zip(raw, grads, weights, strict=True):
            leaf = t.to(wide).requires_grad_()
            heads = leaf.unflatten(-1, (-1, head_size))
            normed = rms_norm_reference(
                *(heads, weight.to(wide), 1e-5), offset=offset, round_first=round_first
            )
            y = rotated(normed.transpose(1, 2), cos.to(wide), sin.to(wide)).transpose(1, 2)
            (dt,) = torch.autograd.grad(y, leaf, grad.to(wide).unflatten(-1, (-1, head_size)))
            found += [y.detach().flatten(2), dt]
    norms = passes.HeadNorms(*weights, 1e-5, offset, round_first)
    with watched(int32_limit=5000):
        q, k = passes.rotate(*raw, cos, sin, norms)
        passes.rotate_back_(*grads, cos, sin, *raw, norms)
    own = distances([q, grads[0], k, grads[1]], expected)
    for ours, theirs in zip(own, distances(plain, expected), strict=True):
        assert ours <= 1.1 * theirs + 1e-7


def test_one_kernel_rotates_queries_and_keys():
    with watched() as traffic, torch.no_grad():
        lora_decoder_layer(**make(), backend="triton")
    names = [launch.kernel for launch in traffic.launches]
    assert names.count("rotate_kernel") == 1
    assert names.count("norm_forward_kernel") == 2


def test_second_derivative_raises():
    arguments = make()
    y, _, _ = lora_decoder_layer(**arguments, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_decoder_layer is once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "mish"}, "act='mish' is unknown"),
        ({"remake": "all"}, "remake='all' is unknown; use one of '', 'gate', 'most'"),
        ({"weights": []}, "there are 0 weights, 7 biases"),
        ({"x": torch.zeros(S, D)}, r"x has shape \(19, 32\); it must be"),
        ({"cos": torch.zeros(1, S + 1, HEAD_SIZE)}, r"cos has shape \(1, 20, 16\)"),
        ({"cos": torch.zeros(1, HEAD_SIZE, S).transpose(1, 2)}, "cos has strides"),
        ({"cos": torch.zeros(1, S, 12), "sin": torch.zeros(1, S, 12)}, "heads of size 12"),
        ({"norms": [Norm(torch.ones(D + 1), 1e-5)] * 2}, r"norms\[0\]: its weight must be \[32\]"),
        ({"biases": [torch.zeros(3), *[None] * 6]}, r"biases \(q\) has shape \(3,\)"),
        ({"biases": [torch.zeros(INNER, requires_grad=True), *[None] * 6]}, "requires a gradient; freeze"),
        ({"loras": [LoRA(torch.zeros(4, 3), torch.zeros(INNER, 4), 1.0), *[None] * 6]}, r"loras \(q\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lora_decoder_layer(**make() | change)


@pytest.mark.parametrize("remake", ["", "gate", "most"])
def test_opcheck(remake):
    arguments = make(batch=1)
    linears = list(map(Linear, *(arguments[name] for name in ("weights", "biases", "loras"))))
    parts = [arguments[name] for name in ("x", "cos", "sin", "norms")]
    call = steps.Layer(*parts, linears, "silu", 0.25, "flash", remake)
    arguments = encode(call)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(steps.lora_decoder_layer.library, arguments, test_utils=tests)
