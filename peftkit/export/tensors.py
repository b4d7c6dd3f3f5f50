"""Names, row order and storage of tensors in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from peftkit.errors import ContractError
from peftkit.export.families import Family, head_dim, require_gguf, rope_of

DType = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[DType, ...] = ("f32", "f16", "bf16", "q8_0")
_BLOCK = 32  # elements that share one scale in q8_0


class Namer:
    """Translates names of transformers' parameters, such as ``model.layers.0.self_attn.q_proj.weight``."""

    def __init__(self, family: Family, config: Any):
        gguf = require_gguf()
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._family, self._config = family, config

    def __call__(self, name: str) -> str:
        """The name in the file.

        Raises:
            ContractError: llama.cpp has no tensor for this parameter.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ContractError(
                f"{name} is no tensor of GGUF's architecture {self._family.arch}; only the architecture as transformers defines it "
                "can be exported"
            )
        return found

    def reorder(self, name: str, rows: Tensor) -> Tensor:
        """Reorder the rows of queries and keys for llama.cpp's rotation, if this architecture needs it.

        Args:
            name: Name of the parameter, or of the module.
            rows: ``[heads · head_dim, ...]``.
        """
        if not self._family.interleaved:
            return rows
        module = name.removesuffix(".weight").removesuffix(".bias")
        if module.endswith(".q_proj"):
            return interleave(rows, self._config.num_attention_heads)
        if module.endswith(".k_proj"):
            return interleave(rows, self._config.num_key_value_heads)
        return rows


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Move row ``i`` of each half of a head to ``2i`` and ``2i + 1``.

    Args:
        rows: ``[heads · head_dim, ...]``.
        heads: Number of heads.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def storage_of(shape: tuple[int, ...], dtype: DType) -> Any:
    """How a tensor is stored: vectors in float32, matrices in ``dtype``, or in float16 if q8_0 does not divide their rows."""
    kinds = require_gguf().GGMLQuantizationType
    if len(shape) < 2:
        return kinds.F32
    if dtype == "q8_0" and shape[-1] % _BLOCK:
        return kinds.F16
    return kinds[dtype.upper()]


def stored(tensor: Tensor, kind: Any) -> np.ndarray:
    """The bytes of a tensor in a storage of GGUF.

    Raises:
        ContractError: A value is too large for float16.
    """
    gguf = require_gguf()
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    limit = np.finfo(np.float16).max
    if kind == gguf.GGMLQuantizationType.F16 and values.size and np.abs(values).max() > limit:
        raise ContractError(
            f"dtype='f16': a weight is {np.abs(values).max():g}, larger than float16 can hold; use bf16 or f32"
        )
    return gguf.quants.quantize(values, kind)


def stored_bytes(shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], int]:
    """Shape and size in bytes of the array that ``stored`` returns for a tensor of this shape."""
    gguf = require_gguf()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * size
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return shape, nbytes
    return gguf.quant_shape_to_byte_shape(shape, kind), nbytes


def rope_factors(config: Any) -> Tensor | None:
    """``rope_freqs.weight`` of the ``llama3`` rotary embedding: each frequency's divisor, ``Float32[head_dim/2]``.

    It is the quotient of the plain frequencies and those that transformers computes.
    """
    if rope_of(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain_frequencies(config) / scaled


def plain_frequencies(config: Any) -> Tensor:
    """``theta^(-2i/head_dim)``, ``Float32[head_dim/2]``."""
    size = head_dim(config)
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (rope_of(config)["rope_theta"] ** steps)


def tensor_table(weights: list[Any], namer: Namer, tied: bool) -> Iterator[tuple[str, Any]]:
    """Names in the file and weights, without an output embedding that is the input embedding.

    Args:
        weights: ``Weight`` objects.
        namer: Translates names.
        tied: Whether the model's output embedding is its input embedding, also after merging.
    """
    for weight in weights:
        if not (tied and weight.name == "lm_head.weight"):
            yield namer(weight.name), weight
