"""The dropout rule: the published generator, the same mask in torch ops and in C, and its statistics."""

import pytest
import torch
from markers import needs_native

from peftkit_kernels import native
from peftkit_kernels.core.dropout import (
    _philox,
    apply_dropout,
    draw_seed,
    dropout_mask,
    keep_scale,
    threshold,
)

SEEDS = (0, 1, 2**32 - 1, 2**32, 2**62 + 12345, 2**63 - 1)


def philox(counter, key, rounds):
    """Philox4x32 as published, on Python integers."""
    words, key = list(counter), list(key)
    for _ in range(rounds):
        products = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        (high0, low0), (high1, low1) = (divmod(product, 2**32) for product in products)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words


@pytest.mark.parametrize(
    ("rounds", "word", "expected"),
    [
        (7, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, 2**32 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, 2**32 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_known_answers_of_the_generator(rounds, word, expected):
    """Test vectors that come with Salmon et al.'s own implementation."""
    words = philox([word] * 4, [word] * 2, rounds)
    assert " ".join(f"{w:08x}" for w in words) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_generator_in_torch_ops(seed):
    counters = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**33 + 5]
    actual = torch.stack(_philox(torch.tensor(counters), seed), dim=-1).tolist()
    key = [seed % 2**32, seed >> 32]
    assert actual == [philox([c % 2**32, c >> 32, 0, 0], key, 7) for c in counters]


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_mask_is_the_rule(columns):
    seed, p = SEEDS[4], 0.3
    mask = dropout_mask(5, columns, p, seed)
    groups = -(-columns // 8)
    for row in range(5):
        for column in range(columns):
            counter, j = row * groups + column // 8, column % 8
            word = philox([counter, 0, 0, 0], [seed % 2**32, seed >> 32], 7)[j // 2]
            draw = word >> 16 if j % 2 else word & 0xFFFF
            assert bool(mask[row, column]) == (draw >= 19661)


@needs_native
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999, 1.0])
def test_native_pass_has_the_same_bits(p, seed, monkeypatch):
    calls = []
    original = native.dropout
    monkeypatch.setattr(native, "dropout", lambda *args: calls.append(1) or original(*args))
    for shape in ((1, 1), (7, 8), (64, 33), (3, 200), (0, 5)):
        x = torch.randn(shape)
        with torch.no_grad():
            fast = apply_dropout(x, p, seed)
        with monkeypatch.context() as patch:
            patch.setattr(native, "supports", lambda *tensors: False)
            assert torch.equal(apply_dropout(x, p, seed), fast)
    assert len(calls) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_values_are_scaled_and_the_others_zero(dtype):
    x, p, seed = torch.randn(40, 37).to(dtype), 0.25, 9
    y, mask = apply_dropout(x, p, seed), dropout_mask(40, 37, p, seed)
    assert y.dtype == dtype
    assert torch.equal(y[mask], x[mask] * (4 / 3))
    assert not y[~mask].any()
    assert mask.any()
    assert not mask.all()


def test_a_recorded_input_gets_its_gradient():
    x = torch.randn(6, 9, requires_grad=True)
    y = apply_dropout(x, 0.5, 3)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, dropout_mask(6, 9, 0.5, 3) * 2.0)


def test_nothing_dropped_is_the_tensor_itself():
    x = torch.randn(3, 5)
    assert apply_dropout(x, 0.0, 0) is x
    assert torch.equal(apply_dropout(x, 1e-6, 5), x)
    assert not apply_dropout(x, 1.0, 5).any()


def test_a_mask_of_fewer_rows_is_its_beginning():
    assert torch.equal(dropout_mask(9, 20, 0.3, 4), dropout_mask(30, 20, 0.3, 4)[:9])
    assert not torch.equal(dropout_mask(9, 20, 0.3, 4), dropout_mask(9, 20, 0.3, 5))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_keep_rate_and_independence(p):
    mask = dropout_mask(400, 403, p, 2**40 + 3).double()
    n = mask.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * deviation
    centred = mask - mask.mean()
    for shift in ((0, 1), (0, 4), (0, 8), (1, 0)):
        correlation = (centred * centred.roll(shift, (0, 1))).mean() / (p * (1 - p))
        assert abs(correlation) < 4 / n**0.5, shift


@pytest.mark.parametrize(
    ("p", "dropped"), [(0.0, 0), (0.1, 6554), (0.5, 32768), (1.0, 65536), (1e-9, 0)]
)
def test_threshold_and_scale(p, dropped):
    assert threshold(p) == dropped
    assert keep_scale(p) * (65536 - dropped) == (65536 if dropped < 65536 else 0)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"p={p} is not a probability; pass a value from 0 to 1"):
        apply_dropout(torch.zeros(1, 1), p, 0)


def test_seeds_follow_torchs_generator():
    torch.manual_seed(5)
    first = [draw_seed() for _ in range(50)]
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(50)] == first
    assert len(set(first)) == 50
    assert all(0 <= seed < 2**63 for seed in first)
    assert max(first) > 2**61
