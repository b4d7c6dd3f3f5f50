"""The kinds of base: what ``base=`` may be, what a checkpoint already is, and bitsandbytes' settings for each."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from peftkit.errors import ContractError, short

Base = Literal["auto", "bf16", "fp16", "fp32", "int8", "nf4", "fp8"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTISED = ("int8", "nf4")
"""The kinds that bitsandbytes stores."""

FLOAT8 = "fp8"


def require_base(base: Any) -> None:
    """Raise unless ``base`` is a kind that can be loaded.

    Raises:
        ContractError: It is none of them.
    """
    known = get_args(Base)
    if base not in known:
        raise ContractError(
            f"base={short(base)} is no kind of base; use one of {', '.join(map(repr, known))}"
        )


def require_bitsandbytes(base: str) -> None:
    """Raise if ``base`` needs bitsandbytes and it is not installed.

    Raises:
        ContractError: It is missing.
    """
    if base in QUANTISED and find_spec("bitsandbytes") is None:
        raise ContractError(
            f"base={base!r} needs bitsandbytes, which is not installed: pip install bitsandbytes; or use base='bf16'"
        )


def stored_kind(config: Any) -> str | None:
    """How the weights of a checkpoint are quantised: ``"nf4"``, ``"fp4"``, ``"int8"``, the name of another method, or ``None``.

    Args:
        config: The config of the model.
    """
    settings = quantization_settings(config)
    if settings is None:
        return None
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """``quantization_config`` of a model's config, or of its text model's, as a dictionary; ``None`` if it has none."""
    settings = getattr(config, "quantization_config", None)
    if settings is None and hasattr(config, "get_text_config"):
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()


def require_compatible(base: str, stored: str | None, keep: tuple[str, ...], where: str) -> None:
    """Raise unless a checkpoint that is stored as ``stored`` can be loaded as ``base``.

    Raises:
        ContractError: It is quantised in another way, or ``keep`` cannot have an effect.
    """
    if stored is not None and base not in ("auto", stored):
        raise ContractError(
            f"base={base!r}, but the weights of {where} are already quantised ({stored}). Load them as they are with base='auto', "
            f"or load the checkpoint from which they were quantised with base={base!r}"
        )
    if keep and (stored is not None or base not in (*QUANTISED, FLOAT8)):
        reason = f"the weights of {where} are already quantised" if stored else f"base={base!r}"
        raise ContractError(f"keep={list(keep)}, but {reason}, so keep has no effect; remove it")


def bitsandbytes_settings(base: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of transformers' ``BitsAndBytesConfig`` for ``base``."""
    if base == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
    }
