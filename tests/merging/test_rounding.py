"""Rounding by outputs: never worse than its start on the inputs, optimal in small cases, exact storage."""

import itertools

import pytest
import torch
from bitsandbytes import functional as bnb

from peftkit.base.storage import quantize_int8, quantize_nf4
from peftkit.merging.rounding import _factor, cast_to_outputs, quantize_to_outputs, round_to_outputs

pytestmark = pytest.mark.usefixtures("one_thread")

STORAGES = {"nf4": quantize_nf4, "int8": quantize_int8}


def activations(M, K, seed=0):
    """Rows like those of language models: a few directions are much larger than all others."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(K, K, generator=generator) * torch.logspace(0, -3, K)[:, None]
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)) @ mixing


def case(storage, M=256, N=32, K=128, size=0.02):
    generator = torch.Generator().manual_seed(0)
    base = STORAGES[storage](torch.randn(N, K, generator=generator))
    delta = torch.randn(N, 2, generator=generator) @ torch.randn(2, K, generator=generator)
    return base, base.dense() + size * delta, activations(M, K)


def error(weight, target, inputs):
    return (inputs @ (weight - target).T).norm().item()


@pytest.mark.parametrize(("storage", "size"), [("nf4", 0.02), ("int8", 0.002)])
def test_the_error_of_the_outputs_falls_also_for_other_inputs(storage, size):
    base, target, inputs = case(storage, size=size)
    found = quantize_to_outputs(base, target, inputs)
    for x in (inputs, activations(256, 128, seed=5)):
        lost = error(base.dense(), target, x)
        assert error(base.quantized(target).dense(), target, x) > 0.8 * lost
        assert error(found.dense(), target, x) < 0.8 * lost
    for name, tensor in base.entries().items():
        same = torch.equal(found.entries()[name], tensor)
        assert same == (name != "weight"), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("M", [1, 2, 30, 500])
def test_never_worse_than_the_nearest_levels_on_the_inputs(storage, M):
    base, target, inputs = case(storage, M=M)
    levels, scale = base.levels(), base.scale()
    nearest = ((target / scale)[..., None] - levels).abs().argmin(-1)
    start = base.with_indices(nearest).dense()
    x = inputs / inputs.norm(dim=1, keepdim=True)
    assert error(quantize_to_outputs(base, target, inputs).dense(), target, x) <= error(
        start, target, x
    )


def test_inputs_without_structure_leave_the_nearest_levels():
    """A few random inputs do not tell which directions matter."""
    base, target, _ = case("nf4")
    white = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    levels, scale = base.levels(), base.scale()
    nearest = base.with_indices(((target / scale)[..., None] - levels).abs().argmin(-1)).dense()
    found = quantize_to_outputs(base, target, white).dense()
    other = torch.randn(500, 128, generator=torch.Generator().manual_seed(3))
    assert error(found, target, other) < 1.1 * error(nearest, target, other)


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_changes_without_an_adapter(storage):
    base, _, inputs = case(storage)
    found = quantize_to_outputs(base, base.dense(), inputs)
    assert torch.equal(found.entries()["weight"], base.entries()["weight"])


def test_the_same_inputs_give_the_same_bytes():
    base, target, inputs = case("nf4")
    once, again = (quantize_to_outputs(base, target, inputs) for _ in range(2))
    assert torch.equal(once.packed, again.packed)


def test_each_column_is_optimal_given_the_others():
    """At the end no single value can be exchanged for a better one."""
    base, target, inputs = case("nf4", N=4, K=64, M=100)
    found = quantize_to_outputs(base, target, inputs, sweeps=50)
    factor, ridge = _factor(inputs)
    x = inputs / inputs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(factor @ factor.T, x.T @ x / len(x), rtol=1e-4, atol=1e-6)

    def objective(weight):
        rest = (weight - target).double()
        return (rest @ factor.double()).pow(2).sum(1) + ridge * rest.pow(2).sum(1)

    weight, scale = found.dense(), found.scale()
    best = objective(weight)
    for column, level in itertools.product(range(64), found.levels()):
        other = weight.clone()
        other[:, column] = level * scale[:, column]
        assert bool((objective(other) >= best * (1 - 1e-4)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_more_of_a_small_update_than_rounding_does(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 256, generator=generator).to(dtype).float()
    small = 0.002 if dtype is torch.bfloat16 else 0.0003
    delta = torch.randn(64, 2, generator=generator) @ torch.randn(2, 256, generator=generator)
    target, inputs = base + small * delta, activations(256, 256)
    found = cast_to_outputs(dtype, target, inputs)
    assert found.dtype is dtype
    nearest = error(target.to(dtype).float(), target, inputs)
    assert error(found.float(), target, inputs) < 0.5 * nearest


def test_zero_inputs_leave_the_nearest_values():
    base, target, _ = case("nf4")
    found = quantize_to_outputs(base, target, torch.zeros(4, 128))
    levels, scale = base.levels(), base.scale()
    nearest = ((target / scale)[..., None] - levels).abs().argmin(-1)
    assert torch.equal(found.dense(), levels[nearest] * scale)


def test_a_wrong_start_is_repaired():
    generator = torch.Generator().manual_seed(0)
    target, start, inputs = (
        torch.randn(8, 32, generator=generator),
        torch.zeros(8, 32),
        activations(200, 32),
    )
    found = round_to_outputs(start, target, inputs, lambda values, column: values, sweeps=2000)
    assert error(found, target, inputs) < 1e-3 * error(start, target, inputs)


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.bfloat16])
def test_the_levels_of_a_storage_are_its_bytes(blocksize, storage_dtype):
    base = quantize_nf4(torch.randn(16, 128), blocksize, True, storage_dtype)
    indices = (base.dense()[..., None] - base.levels() * base.scale()[..., None]).abs().argmin(-1)
    again = base.with_indices(indices)
    assert again.packed.dtype is storage_dtype
    assert torch.equal(again.packed.view(torch.uint8), base.packed.view(torch.uint8))
    whole = quantize_int8(torch.randn(16, 128))
    found = whole.with_indices(whole.codes.long() + 127)
    assert torch.equal(found.codes, whole.codes)


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16], ids=str)
def test_nf4_is_bitsandbytes_own_in_every_setting(blocksize, nested, quant_storage):
    """More rows than are quantised together."""
    weight = torch.randn(1500, 320, generator=torch.Generator().manual_seed(0))
    actual = quantize_nf4(weight, blocksize, nested, quant_storage)
    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=quant_storage,
    )
    assert torch.equal(actual.packed.view(torch.uint8), packed.view(torch.uint8))
    assert actual.packed.shape == packed.shape
    expected = state.as_dict(packed=True)
    found = actual.state.as_dict(packed=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
