"""The dropout rule of every op: the mask is a pure function of (seed, row, column), so it is recomputed, never stored.

Element ``(row, col)`` of a ``[M, K]`` tensor is kept iff ``d >= round(65536 p)``, where ``d`` is the 16-bit draw
``col % 8`` of philox4x32 with 7 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), key = seed,
counter = ``(row * ceil(K / 8) + col // 8, 0, 0, 0)``; draw ``j`` is the low (even ``j``) or high (odd ``j``) half of
output word ``j // 2``. Kept values are multiplied by the exact inverse of the realised keep rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import native

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def draw_seed() -> int:
    """One 63-bit seed from torch's CPU generator, so that ``torch.manual_seed`` and checkpointing reproduce it."""
    # device="cpu", because the user may have set another default device
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def threshold(p: float) -> int:
    """How many of the 65,536 possible draws drop an element.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} is not a probability; pass a value from 0 to 1")
    return round(65536 * p)


def keep_scale(p: float) -> float:
    """The factor on kept elements: 65536 / (65536 - threshold), and 0 if every element is dropped."""
    kept = 65536 - threshold(p)
    return 65536 / kept if kept else 0.0


def dropout_mask(
    rows: int,
    columns: int,
    p: float,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    first_row: int = 0,
) -> Tensor:
    """``Bool[rows, columns]``, true where an element is kept. These are the rows from ``first_row`` on of a larger mask."""
    groups = (columns + 7) // 8
    counter = torch.arange(
        first_row * groups, (first_row + rows) * groups, dtype=torch.int64, device=device
    )
    words = _philox(counter, seed)  # 4 x [rows * groups]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    draws = torch.stack(halves, dim=-1).view(rows, groups * 8)[:, :columns]
    return draws >= threshold(p)


def apply_dropout(x: Tensor, p: float, seed: int, *, first_row: int = 0) -> Tensor:
    """``mask ∘ x · keep_scale`` as a new tensor.

    Args:
        x: ``[M, K]``, contiguous.
        p: Probability of dropping an element; 0 returns ``x`` itself.
        seed: 63-bit seed from ``draw_seed``.
        first_row: If ``x`` is a block of rows of a larger tensor: the row at which the block starts.
    """
    if p == 0.0:
        return x
    if first_row == 0 and native.supports(x):
        return native.dropout(x, threshold(p), keep_scale(p), seed)
    mask = dropout_mask(x.shape[0], x.shape[1], p, seed, x.device, first_row=first_row)
    return torch.where(mask, x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))


def _philox(counter: Tensor, seed: int) -> list[Tensor]:
    """Philox4x32-7 in int64 arithmetic; words are kept in the low 32 bits."""
    zero = torch.zeros_like(counter)
    words = [counter & _WORD, counter >> 32, zero, zero]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD]
    return words


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # the product wraps past 2^63 but keeps its 64 bits; masking after the shift drops the sign extension
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
