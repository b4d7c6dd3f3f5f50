"""Quantise one weight into bitsandbytes' storage, a few rows at a time.

bitsandbytes quantises a whole tensor at once, and its code for the CPU makes several float32 copies of it. Its results for one row (8 bits)
or one block of 64 values (4 bits) do not depend on the others, so the result here is equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from torch import Tensor

from peftkit.base.keep import BLOCKSIZE
from peftkit.errors import ContractError

_NESTED_BLOCKSIZE = 256
_CHUNK = 2**18
"""Values that are quantised together. bitsandbytes needs about 35 bytes for each on the CPU: 9 MiB, a fifth of a weight of 2**24 values."""


def quantize_nf4(weight: Tensor, name: str, module: Any) -> Any:
    """The weight as ``Params4bit`` in NF4, blocks of 64, their maxima in 8 bits (double quantisation).

    Args:
        weight: ``Float[N, K]``, on the device where the result should be.
        name: Its name, for the message.
        module: The ``Linear4bit`` that gets the weight.

    Raises:
        ContractError: The weight has values that are not finite.
    """
    packed, state = pack_nf4(weight, weight.shape, name)
    return _in_4_bits(module, packed, state)


def _in_4_bits(module: Any, packed: Tensor, state: Any) -> Any:
    """``Params4bit`` from its codes and bitsandbytes' ``QuantState``."""
    module.quant_state = state
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCKSIZE,
        compress_statistics=True,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )


def quantize_stack_nf4(weight: Tensor, name: str) -> tuple[Tensor, Any]:
    """Quantise a stack of weights as ``quantize_nf4`` does one weight.

    Args:
        weight: ``Float[E, N, K]``, on the device where the result should be.
        name: Its name, for the message.

    Returns:
        ``UInt8[numel/2, 1]``, and bitsandbytes' ``QuantState``.

    Raises:
        ContractError: The weight has values that are not finite.
    """
    return pack_nf4(weight.reshape(-1, weight.shape[-1]), weight.shape, name)


def quantize_int8(weight: Tensor, name: str) -> Any:
    """The weight as ``Int8Params``: 8-bit codes and the maximum of each row. It is rounded to float16 before.

    Args:
        weight: ``Float[N, K]``, on the device where the result should be.
        name: Its name, for the message.

    Raises:
        ContractError: The weight has values that are not finite in float16.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start, rows in _chunks(weight):
        first = start // weight.shape[1]
        part = slice(first, first + len(rows))
        narrow = rows.to(torch.float16)
        _require_finite(narrow, name)
        codes[part], absmax[part], _ = functional.int8_vectorwise_quant(narrow)
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)


def uninitialized(weight: Tensor, name: str, module: Any) -> Any:
    """The tensors of ``quantize_nf4`` or ``quantize_int8`` without their values, for a weight that has none.

    Args:
        weight: ``Float[N, K]``; only its shape, dtype and device are used.
        name: Its name.
        module: The ``Linear4bit`` or ``Linear8bitLt`` that gets the weight.
    """
    device, shape = weight.device, (module.out_features, module.in_features)
    weight = weight if weight.shape == shape else weight.T  # Conv1D
    if isinstance(module, Linear8bitLt):
        codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
        absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    return _in_4_bits(module, *uninitialized_nf4(weight, weight.shape))


def uninitialized_nf4(weight: Tensor, shape: torch.Size) -> tuple[Tensor, Any]:
    """The tensors of ``pack_nf4`` without their values."""
    device = weight.device
    blocks = math.ceil(weight.numel() / BLOCKSIZE)
    packed = torch.empty(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8, device=device)
    outer = functional.QuantState(
        absmax=torch.empty(math.ceil(blocks / _NESTED_BLOCKSIZE), device=device),
        code=torch.empty(256, device=device),
        blocksize=_NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    offset = torch.zeros((), device=device)
    return packed, _state(weight, shape, BLOCKSIZE, codes, offset, outer)


def pack_nf4(
    weight: Tensor,
    shape: torch.Size,
    name: str | None = None,
    blocksize: int = BLOCKSIZE,
    nested: bool = True,
) -> tuple[Tensor, Any]:
    """Quantise the rows of ``weight Float[M, K]`` as a weight of this shape.

    Args:
        weight: The values.
        shape: The shape of the weight, with as many values.
        name: Its name, to raise an error for values that are not finite; without it they are not looked for.
        blocksize: Values that share one maximum.
        nested: Store the maxima in 8 bits.

    Returns:
        ``UInt8[numel/2, 1]``, and bitsandbytes' ``QuantState``.

    Raises:
        ContractError: The weight has values that are not finite.
    """
    numel, device = weight.numel(), weight.device
    packed = torch.empty(math.ceil(numel / 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(numel / blocksize), dtype=torch.float32, device=device)
    for start, rows in _chunks(weight, blocksize):
        if name is not None:
            _require_finite(rows, name)
        part, state = functional.quantize_4bit(
            rows, blocksize=blocksize, compress_statistics=False, quant_type="nf4"
        )
        packed[start // 2 : start // 2 + len(part)] = part
        absmax[start // blocksize :][: len(state.absmax)] = state.absmax
    offset = outer = None
    if nested:
        offset = absmax.mean()
        absmax, outer = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCKSIZE)
    return packed, _state(weight, shape, blocksize, absmax, offset, outer)


def _state(
    weight: Tensor, shape: torch.Size, blocksize: int, absmax: Tensor, offset: Any, outer: Any
) -> Any:
    """The ``QuantState`` of bitsandbytes, from the block maxima (or their codes) and, if they are nested, their mean and storage."""
    return functional.QuantState(
        absmax=absmax,
        shape=shape,
        dtype=weight.dtype,
        blocksize=blocksize,
        code=functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=outer,
    )


def _chunks(weight: Tensor, blocksize: int = BLOCKSIZE) -> Iterator[tuple[int, Tensor]]:
    """Yield contiguous rows, and the number of values before them: a multiple of the block size, and even."""
    width = max(1, weight.shape[1])
    step = max(1, _CHUNK // width // blocksize) * blocksize
    for first in range(0, weight.shape[0], step):
        yield first * width, weight[first : first + step].contiguous()


def _require_finite(rows: Tensor, name: str) -> None:
    if not bool(rows.isfinite().all()):
        raise ContractError(
            f"{name} has values that are NaN or infinite in {rows.dtype}, so it cannot be quantised; repair it, or do not quantise its "
            f"module: keep=[{name.removesuffix('.weight')!r}]"
        )
