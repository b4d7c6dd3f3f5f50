"""The frozen weight below an adapter: read it as float32, and store another one in the same storage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.storage import Int8Storage, NF4Storage, Storage, replaces_conv1d, storage_of

_DENSE = (torch.float32, torch.float16, torch.bfloat16)


class BaseWeight:
    """The weight of a linear that carries an adapter.

    Attributes:
        storage: ``"nf4"``, ``"int8"`` or a dtype.
        shape: ``(N, K)``.
        transposed: Whether checkpoints have it as ``[K, N]``: the layer is, or replaced, transformers' ``Conv1D``.
    """

    def __init__(self, base: Any):
        """Check that the weight can be read and stored.

        Raises:
            ValueError: It cannot; the message says why, without naming the layer.
        """
        from transformers.pytorch_utils import Conv1D

        self._base = base
        quantised = storage_of(base)
        if quantised is None and type(base) not in (nn.Linear, Conv1D):
            raise ValueError(f"its base layer is a {type(base).__name__}")
        if quantised is None and base.weight.dtype not in _DENSE:
            raise ValueError(f"its base weight is {base.weight.dtype}")
        if base.weight.is_meta:
            raise ValueError("its base weight is on the device meta")
        self._dense = quantised is None
        self._conv = isinstance(base, Conv1D)
        self.transposed = self._conv or replaces_conv1d(base)
        self.storage = quantised.name if quantised else str(base.weight.dtype)[len("torch.") :]
        shape = tuple(base.weight.T.shape if self._conv else base.weight.shape)
        self.shape = shape if quantised is None else (base.out_features, base.in_features)

    @property
    def is_quantised(self) -> bool:
        """Whether the storage is one of bitsandbytes."""
        return not self._dense

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._base.weight.device

    def decoded(self) -> Tensor:
        """``Float32[N, K]``, by the definition of the storage."""
        if not self._dense:
            return self._stored().dense()
        weight = self._base.weight.detach()
        return (weight.T if self._conv else weight).float()

    def store(self, weight: Tensor) -> None:
        """Replace the weight by ``weight Float32[N, K]``, quantised or rounded to the nearest values."""
        if self._dense:
            # new memory, so that an undo finds the old values
            new = (weight.T if self._conv else weight).to(self._base.weight.dtype)
            self._base.weight.data = new.contiguous()
            return
        stored = self._stored().quantized(weight)
        if isinstance(stored, NF4Storage):
            self._store_nf4(stored)
        else:
            assert isinstance(stored, Int8Storage)
            self._store_int8(stored)

    def _stored(self) -> Storage:
        stored = storage_of(self._base)
        assert stored is not None
        return stored

    def _store_nf4(self, stored: NF4Storage) -> None:
        from bitsandbytes.nn.modules import Params4bit

        old, state = self._base.weight, stored.state
        self._base.weight = Params4bit(
            stored.packed,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=self._base,
            bnb_quantized=True,
        )
        self._base.quant_state = state

    def _store_int8(self, stored: Int8Storage) -> None:
        from bitsandbytes.nn.modules import Int8Params

        codes, row_absmax = stored.codes, stored.row_absmax
        self._base.weight = Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=row_absmax
        )
        # bitsandbytes keeps the codes here after the first forward, and takes new ones from the weight
        self._base.state.CB = self._base.state.SCB = None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that determine the weight."""
        if self._dense:
            yield self._base.weight.detach()
            return
        stored = self._stored()
        if isinstance(stored, NF4Storage):
            state = stored.state
            yield from (stored.packed, state.absmax)
            if state.nested:
                yield from (state.state2.absmax, state.offset)
        elif isinstance(stored, Int8Storage):
            yield from (stored.codes, stored.row_absmax)


def fingerprint(weights: Iterable[tuple[str, BaseWeight]]) -> str:
    """Sixteen hexadecimal digits that depend on every stored bit of these weights and on their names."""
    found = hashlib.blake2b(digest_size=8)
    for name, weight in weights:
        found.update(name.encode())
        for tensor in weight.tensors():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(memoryview(flat.view(torch.uint8).numpy()))
    return found.hexdigest()
