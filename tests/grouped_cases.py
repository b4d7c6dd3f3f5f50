"""Inputs of ``grouped_lora`` and the error bounds of every output and gradient."""

import torch
from lora_cases import draw

from lab.testing import Bound

K, N, E = 33, 29, 5
NAMES = ("y", "x", "A", "B")
SCALE = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])
IDS = {
    "mixed": lambda M: torch.randint(-1, E, (M,), generator=torch.Generator().manual_seed(3)),
    "none": lambda M: torch.full((M,), -1),
    "one": lambda M: torch.full((M,), 4),
    "every row another": lambda M: torch.arange(M) % E,
    "in runs": lambda M: torch.arange(M) * E // max(1, M),
}


def make(
    M=37,
    dtype=torch.float32,
    factors=None,
    rank=4,
    layout="contiguous",
    trained=NAMES,
    sizes=(K, N),
):
    """The tensors by name. ``sizes`` are the lengths of a row of x and of a row of y."""
    (K, N), generator, factors = sizes, torch.Generator().manual_seed(0), factors or dtype
    leaves = {
        "y": draw((M, N), dtype, generator, layout),
        "x": draw((M, K), dtype, generator, layout),
        "A": draw((E, rank, K), factors, generator) / K**0.5,
        "B": draw((E, N, rank), factors, generator) / rank**0.5,
    }
    return {name: leaf.requires_grad_(name in trained) for name, leaf in leaves.items()}


def output_grad(leaves):
    """The gradient of the output."""
    y = leaves["y"]
    return draw(tuple(y.shape), y.dtype, torch.Generator().manual_seed(1))


def bounds(leaves, ids, dy, tile=None):
    """Bounds by name: with the roundings of the kernels or, if ``tile`` is given, of the torch schedule with ``tile`` rows per tile.

    The kernels multiply float32 sums by the scale. The torch schedule rounds the scale, each product, and the share of each tile in
    a gradient.
    """
    dtype = leaves["x"].dtype
    wide = torch.promote_types(dtype, leaves["A"].dtype)
    y, x, dy = (Bound.of(t) for t in (leaves["y"], leaves["x"], dy))
    out, dx = y.round(dtype), Bound.of(torch.zeros_like(leaves["x"]))
    grads = {name: [] for name in "AB"}
    for e in range(E):
        A, B = (Bound.of(leaves[name][e]) for name in "AB")
        scale, own = Bound.of(SCALE[e]), ids == e
        s = (x[own] @ A.T).round(wide)
        if tile is None:
            update, ds = (s @ B.T) * scale, ((dy[own] @ B) * scale).round(wide)
            dB = (dy[own].T @ s) * scale
            dA = ds.T @ x[own]
        else:
            scale = scale.round(wide)
            scaled = (s * scale).round(wide)
            update = (scaled @ B.T).round(wide)
            ds = ((dy[own] @ B).round(wide) * scale).round(wide)
            dB = _over_tiles(dy[own], scaled, tile, leaves["B"].dtype)
            dA = _over_tiles(ds, x[own], tile, leaves["A"].dtype)
        _put(out, own, (y[own] + update).round(dtype))
        _put(dx, own, (ds @ A).round(dtype))
        grads["A"].append(dA.round(leaves["A"].dtype))
        grads["B"].append(dB.round(leaves["B"].dtype))
    return {"out": out, "x": dx, "y": dy} | {name: _stack(parts) for name, parts in grads.items()}


def _over_tiles(left, right, tile, dtype):
    total = (left[:tile].T @ right[:tile]).round(dtype)
    for start in range(tile, left.value.shape[0], tile):
        rows = slice(start, start + tile)
        total = (total + (left[rows].T @ right[rows]).round(dtype)).round(dtype)
    return total


def _put(target, where, value):
    target.value[where], target.error[where] = value.value, value.error


def _stack(parts):
    value, error = (torch.stack([getattr(p, name) for p in parts]) for name in ("value", "error"))
    return Bound(value, error, parts[0].unit)
