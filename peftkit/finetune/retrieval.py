"""How often images find their texts, and texts their images, among all rows of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

_ROWS = 1024
"""Queries that are compared at a time, so that the similarities of all of them are never in memory."""


def recalls(
    images: Any, texts: Any, image_ids: Any, text_ids: Any, sizes: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """The shares of queries with a right answer among the most similar ones.

    An image or a text that is in several rows is one query and one candidate, and each of its partners is right. A wrong candidate that is
    as similar as the best right one comes first, so that equal vectors for everything find nothing.

    Args:
        images: ``Float[rows, width]``, a vector for the image of each row.
        texts: ``Float[rows, width]``, the same for its text.
        image_ids: ``Int64[rows]``, equal for equal images.
        text_ids: ``Int64[rows]``, equal for equal texts.
        sizes: Numbers of most similar candidates.

    Returns:
        ``image_to_text_recall_at_K`` and ``text_to_image_recall_at_K`` for each size.
    """
    images, own_image = _distinct(images, image_ids)
    texts, own_text = _distinct(texts, text_ids)
    pairs = np.unique(np.stack([own_image, own_text]), axis=1)
    found = {}
    for name, queries, candidates, partners in (
        ("image_to_text", images, texts, pairs),
        ("text_to_image", texts, images, pairs[::-1]),
    ):
        ranks = _ranks(queries, candidates, partners)
        for size in sizes:
            found[f"{name}_recall_at_{size}"] = float(np.mean(ranks <= size))
    return found


def _distinct(vectors: Any, ids: Any) -> tuple[Any, Any]:
    """Unit vectors of the distinct ones, and the number of each row's own."""
    _, first, own = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    chosen = np.asarray(vectors, dtype=np.float64)[first]
    norms = np.linalg.norm(chosen, axis=1, keepdims=True)
    return chosen / np.maximum(norms, np.finfo(np.float64).tiny), own.reshape(-1)


def _ranks(queries: Any, candidates: Any, partners: Any) -> Any:
    """The rank of the best right candidate of each query, from 1."""
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        right = np.zeros(scores.shape, dtype=bool)
        here = (partners[0] >= start) & (partners[0] < start + len(scores))
        right[partners[0][here] - start, partners[1][here]] = True
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[start : start + len(scores)] = 1 + ((scores >= best) & ~right).sum(axis=1)
    return ranks
