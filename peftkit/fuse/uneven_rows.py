"""4-bit linears on the CPU whose rows are no whole blocks: bitsandbytes decodes these as if each row began a block.

The stored codes and maxima are right. bitsandbytes' result on the CPU has an error of a quarter and more (bitsandbytes 0.50.2, weights of
96 or 32 columns; ``tests/fuse/test_uneven_rows.py`` compares with the definition), so an adapter would be trained on another base than the
one that is stored. Its kernels for GPUs decode a flat sequence of blocks, so they are predicted to be right; this was not run on a GPU.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftkit.errors import ContractError
from peftkit.fuse.storage import nf4_weight
from peftkit.swap import swap_in, swapped_in
from peftkit_kernels.ops.quantized_linear import nf4_linear

logger = logging.getLogger(__name__)


class DecodesAsStored:
    """bitsandbytes' ``Linear4bit`` whose forward on the CPU multiplies with the weight that is stored."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``x Wᵀ + bias`` in ``compute_dtype``, in the dtype of ``x``; on a GPU bitsandbytes' own forward."""
        state = self.weight.quant_state
        if x.device.type != "cpu" or state is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue] - of Linear4bit
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if state.quant_type == "nf4":
            return nf4_linear(x.to(dtype), nf4_weight(self), bias).to(x.dtype)
        return F.linear(x.to(dtype), _decoded(self.weight.data, state).to(dtype), bias).to(x.dtype)


class LoadedToDecode(DecodesAsStored):
    """The same for a layer that ``load_base`` has made, which stays so after ``restore``."""


def decode_as_stored(model: nn.Module, mixin: type[DecodesAsStored] = DecodesAsStored) -> None:
    """Give the 4-bit linears of a model that bitsandbytes decodes wrongly on the CPU a right forward, and say so once.

    Args:
        model: A model, changed in place.
        mixin: How long it lasts.
    """
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:
        return
    for module in model.modules():
        base: Any = module._modules.get("base_layer", module)
        if not isinstance(base, library.nn.Linear4bit) or not is_uneven(base):
            continue
        if not any(issubclass(found, DecodesAsStored) for found in swapped_in(base)):
            swap_in(base, mixin)
            if base.weight.device.type == "cpu":
                _say(base.in_features)
        _start_at_stored_norms(module, base)


def is_uneven(linear: Any) -> bool:
    """Whether the rows of a ``Linear4bit`` are no whole blocks."""
    state = getattr(linear.weight, "quant_state", None)
    return state is not None and state.shape[-1] % state.blocksize != 0


def require_even(linear: Any) -> None:
    """Raise ``ContractError`` if PEFT would merge an adapter into a weight that bitsandbytes decodes wrongly."""
    if is_uneven(linear) and linear.weight.device.type == "cpu":
        raise ContractError(
            f"PEFT would merge into a 4-bit weight with rows of {linear.in_features} as bitsandbytes decodes it, which is wrong on the CPU for "
            "rows that are no whole blocks of 64; use peftkit.merge, or merge on a GPU"
        )


@functools.cache
def _say(columns: Any) -> None:
    logger.warning(
        "4-bit weights with rows of %d, which are no whole blocks of 64: bitsandbytes decodes them wrongly on the CPU. peftkit decodes them as "
        "they are stored, so outputs differ from those of plain PEFT on the CPU.",
        columns,
    )


@torch.no_grad()
def _start_at_stored_norms(layer: Any, base: Any) -> None:
    """Give a new DoRA the norms of the stored weight. PEFT has computed them from bitsandbytes' decoded one."""
    for name, magnitude in layer._modules.get("lora_magnitude_vector", {}).items():
        if base.weight.device.type == "cpu" and not layer.lora_B[name].weight.any():
            weight = _decoded(base.weight.data, base.weight.quant_state)
            magnitude.weight.copy_(torch.linalg.norm(weight.float(), dim=1))


def _decoded(packed: Tensor, state: Any) -> Tensor:
    """The weight by definition: the value of each code times the maximum of its block."""
    from bitsandbytes.functional import dequantize_blockwise

    maxima = state.absmax
    if state.nested:
        maxima = dequantize_blockwise(maxima, state.state2) + state.offset
    codes = packed.view(torch.uint8).flatten().long()
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    numbers = state.shape.numel()
    return (values[:numbers] * maxima.repeat_interleave(state.blocksize)[:numbers]).view(
        state.shape
    )
