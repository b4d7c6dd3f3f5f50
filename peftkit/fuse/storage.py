"""Reading bitsandbytes' weights as the quantised weights of ``peftkit_kernels``, and the reasons why one cannot be read."""

from __future__ import annotations

from typing import Any

import torch

from peftkit.fuse.int8_mode import int8_mode_of
from peftkit.fuse.plan import Reason
from peftkit_kernels.core.launch import on_gpu
from peftkit_kernels.storage.int8 import Int8ComputeWeight, Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.weight import BLOCKSIZES, NestedAbsmax, level_table


def nf4_obstacle(base: Any) -> Reason | None:
    """Why the weight of a ``bitsandbytes.nn.Linear4bit`` cannot be read as NF4, or ``None``."""
    state = getattr(base.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return nf4_repacked(base)
    if state.quant_type != "nf4":
        return Reason(f"its base weight is stored as {state.quant_type}; only nf4 can be read")
    if not torch.equal(state.code.cpu(), level_table()):
        return Reason("its base weight has a code table other than that of nf4")
    if tuple(state.shape) != (base.out_features, base.in_features):
        return Reason(f"its base weight was quantised in the transposed shape {tuple(state.shape)}")
    if state.blocksize not in BLOCKSIZES:
        return Reason(f"its base weight is stored in blocks of {state.blocksize}")
    return None


def nf4_repacked(base: Any) -> Reason | None:
    """The part of ``nf4_obstacle`` that can change in a forward: bitsandbytes repacks weights for inference on some CPUs."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return Reason("its base weight is not quantised yet (move the model to its device)")
    if getattr(state, "packing_format_for_cpu", False):
        return Reason("its base weight has been repacked by bitsandbytes for inference on the CPU")
    return None


class StorageSeen:
    """The 4-bit storage that ``nf4_obstacle`` has checked. Each forward compares its identity and version."""

    def __init__(self, base: Any):
        self.state = base.weight.quant_state
        self.code = self.state.code
        self.facts = _facts(self.state)

    def is_of(self, base: Any) -> bool:
        """Whether the base layer still has this storage, unchanged."""
        state = base.weight.quant_state
        return state is self.state and state.code is self.code and _facts(state) == self.facts


def _facts(state: Any) -> tuple[Any, ...]:
    code = state.code
    version = 0 if code.is_inference() else code._version
    return version, state.quant_type, state.blocksize, tuple(state.shape)


def nf4_weight(base: Any) -> NF4Weight:
    """The weight of a ``Linear4bit`` without an ``nf4_obstacle``; shares its memory."""
    state = base.weight.quant_state
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedAbsmax(inner.code, inner.absmax, state.offset, inner.blocksize)
    # quant_storage may be any dtype, so that FSDP can shard it
    packed = base.weight.data.view(torch.uint8)
    return NF4Weight(packed, state.absmax, tuple(state.shape), state.blocksize, nested)


def int8_obstacle(base: Any) -> Reason | None:
    """Why a ``bitsandbytes.nn.Linear8bitLt`` is not a product with a fixed 8-bit weight, or ``None``."""
    if base.state.has_fp16_weights:
        return Reason("its base weight is quantised again in every forward (has_fp16_weights=True)")
    if _codes(base) is None:
        return Reason("its base weight is not quantised yet (move the model to its device)")
    kind = base.weight.device.type
    if kind != "cpu" and not on_gpu(base.weight.device):
        return Reason(f"8-bit weights were not tried on {kind}")
    if kind == "cpu" and not base.training and int8_mode_of(base) is None:
        return Reason(
            "bitsandbytes also quantises the activations in evaluation; it is fused in training, and with int8_mode also here"
        )
    return None


def int8_weight(base: Any) -> Int8Weight:
    """The weight of a ``Linear8bitLt`` without an ``int8_obstacle``; shares its memory.

    By default it is as bitsandbytes multiplies it: on a GPU in 8 bits, with a backward in 16 bits; on the CPU (in training) decoded.
    """
    (codes, absmax), mode = _codes(base), int8_mode_of(base)
    threshold = base.state.threshold or None
    if mode == "compute":
        return Int8ComputeWeight(codes, absmax, threshold, backward_in_8_bits=True)
    if mode == "weight-only" or codes.device.type == "cpu":
        return Int8Weight(codes, absmax)
    return Int8ComputeWeight(codes, absmax, threshold)


def _codes(base: Any) -> Any:
    """Codes and row maxima. bitsandbytes keeps them on the weight before the first forward, and in the state after it.

    A weight that was replaced has its own, and the state still those of the old one.
    """
    for holder in (base.weight, base.state):
        if holder.CB is not None and holder.SCB is not None:
            return holder.CB, holder.SCB
    return None
