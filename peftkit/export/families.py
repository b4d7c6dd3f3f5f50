"""The architectures that are exported, and what llama.cpp assumes of them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from peftkit.errors import ContractError


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        model_type: Its name in transformers.
        arch: Its name in GGUF.
        interleaved: Whether llama.cpp rotates neighbouring dimensions (2i, 2i + 1) of queries and keys, so that the rows of
            their weights are reordered. transformers rotates (i, i + head_dim/2).
    """

    model_type: str
    arch: str
    interleaved: bool


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama", True),
        Family("mistral", "llama", True),
        Family("qwen2", "qwen2", False),
        Family("qwen3", "qwen3", False),
    )
}


def family_of(config: Any) -> Family:
    """The family of a model.

    Raises:
        ContractError: It is not supported, or the config has a part that llama.cpp does not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ContractError(
            f"model_type={config.model_type!r} cannot be exported to GGUF; supported: {', '.join(FAMILIES)}. For other models "
            "save a merged model with save_pretrained and use llama.cpp's convert_hf_to_gguf.py"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ContractError(
            f"hidden_act={config.hidden_act!r}: llama.cpp computes silu for {family.arch}"
        )
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ContractError(
            f"rope_type={kind!r} cannot be exported for {family.arch}; supported: default, linear, yarn, llama3"
        )
    return family


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def head_dim(config: Any) -> int:
    """Elements of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config: Any) -> int | None:
    """The sliding window, if the model uses one that is shorter than its context."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if window < config.max_position_embeddings else None


def require_gguf() -> ModuleType:
    """Import the ``gguf`` package.

    Raises:
        ContractError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ContractError(
            "GGUF files are written with the package gguf, which is not installed: pip install gguf, or pip install peftkit[gguf]"
        ) from error
    return gguf
