"""What the ops need to know about one kind of storage. Each kind has a folder, whose ``kind.py`` has its ``Kind``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """One kind of storage of frozen weights ``[N, K]``.

    Attributes:
        name: As in ``explain`` and in the kernels' constant ``STORAGE``.
        weight: The class of such a weight. It has ``shape``, ``device`` and ``tensors()``, the tensors that it stores.
        reference: ``reference(q, dtype, row_scale)`` is the decoded weight by its definition in plain torch, times ``row_scale [N]``
            if that is not ``None``.
        decode: ``decode(q, out, row_scale)`` writes the same into ``out`` by torch or native code, and returns it.
        decode_triton: As ``decode``, by a Triton kernel.
        layout: The numbers that ``rebuild`` needs; the last two are ``N`` and ``K``.
        rebuild: The weight, from its tensors and its layout.
    """

    name: str
    weight: type
    reference: Callable[[Any, torch.dtype, Tensor | None], Tensor]
    decode: Callable[[Any, Tensor, Tensor | None], Tensor]
    decode_triton: Callable[[Any, Tensor, Tensor | None], Tensor]
    layout: Callable[[Any], list[int]]
    rebuild: Callable[[Sequence[Tensor], Sequence[int]], Any]
