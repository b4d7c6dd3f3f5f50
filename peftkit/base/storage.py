"""The two quantised storages of bitsandbytes: quantise a float32 weight as bitsandbytes does, decode it, and write it to a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkit_kernels.storage.nf4 import NF4Weight, dequantize_nf4
from peftkit_kernels.storage.nf4.weight import LEVELS, NestedAbsmax

_INT8_LARGEST = 127


class Storage(Protocol):
    """A quantised weight ``[N, K]``: each element is ``levels[index] · scale`` with one scale for several elements."""

    @property
    def name(self) -> str:
        """``"nf4"`` or ``"int8"``."""
        ...

    def dense(self) -> Tensor:
        """``Float32[N, K]``: the weight, decoded by bitsandbytes' definition."""
        ...

    def quantized(self, weight: Tensor) -> Storage:
        """Quantise another weight ``Float32[N, K]`` as bitsandbytes does, with the settings of this one."""
        ...

    def levels(self) -> Tensor:
        """``Float32[levels]``, ascending."""
        ...

    def scale(self) -> Tensor:
        """``Float32[N, K]``, the scale of each element."""
        ...

    def with_indices(self, indices: Tensor) -> Storage:
        """Return the same scales with other levels. ``indices`` is ``Int64[N, K]``, into ``levels``."""
        ...

    def entries(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by the ends of their names, as bitsandbytes' linear saves them."""
        ...


@dataclass(frozen=True)
class NF4Storage:
    """bitsandbytes' 4-bit storage.

    Attributes:
        packed: The parameter's data, of the dtype ``quant_storage``.
        state: bitsandbytes' ``QuantState`` with the block maxima.
    """

    packed: Tensor
    state: Any
    name: str = "nf4"

    def dense(self) -> Tensor:
        """``Float32[N, K]``, or ``[E, N, K]`` for a stack: the weight, decoded by bitsandbytes' definition."""
        weight = self._weight()
        # a matrix is decoded without a second copy
        rows = replace(weight, shape=(math.prod(weight.shape[:-1]), weight.shape[-1]))
        return dequantize_nf4(rows, dtype=torch.float32).view(weight.shape)

    def quantized(self, weight: Tensor) -> NF4Storage:
        """Quantise another weight ``Float32[N, K]`` as bitsandbytes does, with the settings of this one."""
        state = self.state
        return quantize_nf4(
            weight, state.blocksize, state.nested, self.packed.dtype, dtype=state.dtype
        )

    def levels(self) -> Tensor:
        """``Float32[16]``, ascending."""
        return torch.tensor(LEVELS, device=self.packed.device)

    def scale(self) -> Tensor:
        """``Float32[N, K]``, the maximum of each element's block."""
        shape = torch.Size(self.state.shape)
        blocks = self._weight().block_absmax()
        return blocks.repeat_interleave(self.state.blocksize)[: shape.numel()].view(shape)

    def with_indices(self, indices: Tensor) -> NF4Storage:
        """Return the same scales with other levels. ``indices`` is ``Int64[N, K]``, into ``levels``."""
        codes = indices.reshape(-1).to(torch.uint8)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        packed = (codes[::2] << 4) | codes[1::2]
        return replace(self, packed=packed.view(self.packed.dtype).view(self.packed.shape))

    def entries(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by the ends of their names, as bitsandbytes' linear saves them."""
        state = self.state.as_dict(packed=True)
        return {"weight": self.packed} | {f"weight.{key}": value for key, value in state.items()}

    def _weight(self) -> NF4Weight:
        state, nested = self.state, None
        if state.nested:
            inner = state.state2
            nested = NestedAbsmax(inner.code, inner.absmax, state.offset, inner.blocksize)
        packed = self.packed.view(torch.uint8)
        return NF4Weight(packed, state.absmax, tuple(state.shape), state.blocksize, nested)


@dataclass(frozen=True)
class Int8Storage:
    """bitsandbytes' 8-bit storage.

    Attributes:
        codes: ``Int8[N, K]``.
        row_absmax: ``Float32[N]``, the maximum of each row.
    """

    codes: Tensor
    row_absmax: Tensor
    name: str = "int8"

    def dense(self) -> Tensor:
        """``Float32[N, K]``: the weight, decoded by bitsandbytes' definition."""
        import bitsandbytes.functional as bnb

        return bnb.int8_vectorwise_dequant(self.codes, self.row_absmax)

    def quantized(self, weight: Tensor) -> Int8Storage:
        """Quantise another weight ``Float32[N, K]`` as bitsandbytes does, with the settings of this one."""
        return quantize_int8(weight)

    def levels(self) -> Tensor:
        """``Float32[255]``, ascending."""
        steps = torch.arange(-_INT8_LARGEST, _INT8_LARGEST + 1, device=self.codes.device)
        return steps / _INT8_LARGEST

    def scale(self) -> Tensor:
        """``Float32[N, K]``, the maximum of each element's row."""
        return self.row_absmax.float()[:, None].expand(self.codes.shape)

    def with_indices(self, indices: Tensor) -> Int8Storage:
        """Return the same scales with other levels. ``indices`` is ``Int64[N, K]``, into ``levels``."""
        return replace(self, codes=(indices - _INT8_LARGEST).to(torch.int8))

    def entries(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by the ends of their names, as bitsandbytes' linear saves them."""
        layout = torch.tensor(0, dtype=torch.uint8)
        return {"weight": self.codes, "SCB": self.row_absmax, "weight_format": layout}


def quantize_nf4(
    weight: Tensor,
    blocksize: int = 64,
    nested: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    *,
    dtype: torch.dtype | None = None,
) -> NF4Storage:
    """Quantise a weight to NF4 as bitsandbytes does, a few rows at a time.

    Args:
        weight: ``[N, K]``, float32 or 16 bit.
        blocksize: Elements that share one maximum.
        nested: Store the maxima in 8 bits.
        quant_storage: The dtype of the stored bytes.
        dtype: The dtype to which bitsandbytes decodes the weight later. Default: the weight's.
    """
    from peftkit.base.quantize import pack_nf4

    packed, state = pack_nf4(weight, weight.shape, None, blocksize, nested)
    state.dtype = dtype or weight.dtype
    return NF4Storage(packed.view(-1).view(quant_storage).view(-1, 1), state)


def quantize_int8(weight: Tensor) -> Int8Storage:
    """Quantise the rows of a weight ``[N, K]`` to int8 with bitsandbytes' own function, which first rounds them to float16."""
    import bitsandbytes.functional as bnb

    codes, row_absmax, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return Int8Storage(codes, row_absmax)


def replaces_conv1d(linear: Any) -> bool:
    """Whether a layer of bitsandbytes stands for transformers' ``Conv1D``, which checkpoints have transposed: ``[K, N]``."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(linear, "source_cls", object), Conv1D)


def storage_of(linear: Any) -> Storage | None:
    """The storage of a linear's weight, or ``None`` if the linear is not one of bitsandbytes.

    Raises:
        ValueError: The weight is FP4, not quantised yet, or repacked for inference, so that it cannot be read.
    """
    # PEFT's layers have the weight of their base layer as a property
    kind = type(linear._parameters.get("weight")).__name__
    if kind == "Params4bit":
        state = linear.weight.quant_state or getattr(linear, "quant_state", None)
        if state is None:
            raise ValueError("its weight is not quantised yet; move the model to its device")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked its weight for inference; load the base again"
            )
        if state.quant_type != "nf4":
            raise ValueError(
                f"its weight is stored as {state.quant_type}; only nf4 and int8 can be read"
            )
        return NF4Storage(linear.weight.data, state)
    if kind == "Int8Params":
        # a new weight has its own codes until the next forward moves them into the state
        for holder in (linear.weight, linear.state):
            if holder.CB is not None and holder.SCB is not None:
                return Int8Storage(holder.CB, holder.SCB)
        raise ValueError("its weight is not quantised (has_fp16_weights, or not on its device yet)")
    return None
