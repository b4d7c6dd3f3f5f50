"""Embeddings of speakers in rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import short
from peftkit.finetune.tasks.base import BadRow


def embedding_of(value: Any, size: int) -> list[float]:
    """The embedding of a speaker.

    Args:
        value: Numbers, or the path of a ``.npy`` file.
        size: The number of values that the model expects.

    Raises:
        BadRow: It cannot be read, has another size, or has values that are not finite or all zero.
    """
    if isinstance(value, str):
        if not Path(value).is_file():
            raise BadRow(f"the embedding {value} does not exist")
        try:
            found = np.load(value, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadRow(f"{value} is no .npy file with numbers ({error})") from error
        name = value
    else:
        name = f"column 'speaker' ({short(value)})"
        try:
            found = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise BadRow(
                f"{name} is neither a list of numbers nor the path of a .npy file"
            ) from error
    if found.dtype.kind not in "fiu" or found.size != size or found.squeeze().ndim > 1:
        raise BadRow(
            f"{name} has the shape {list(found.shape)} and the type {found.dtype}, but the model's embeddings of speakers have {size} numbers"
        )
    # A zero vector has no direction, and only the direction matters.
    if not np.isfinite(found).all() or not found.any():
        raise BadRow(f"{name} has values that are not finite, or only zeros")
    return found.astype(np.float64).reshape(-1).tolist()
