"""Models without values for their weights, with or without adapters."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftkit.base.checkpoint import read_config
from peftkit.base.classes import model_class
from peftkit.base.inplace import convert
from peftkit.base.kinds import (
    DTYPES,
    QUANTISED,
    require_base,
    require_bitsandbytes,
    require_compatible,
    stored_kind,
)
from peftkit.errors import ContractError, short
from peftkit.fp8 import to_fp8
from peftkit.wrapping import wrap

FULL, PARTIAL = "full", "partial"

_HEADS = ("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "CTC", "SpeechSeq2Seq")
"""Auto classes that are tried for a config that names no architecture."""


def config_of(model: Any) -> Any:
    """The config of a model, or the one that a folder or the hub has for an id; a config is returned as it is.

    Raises:
        ContractError: There is none.
    """
    if isinstance(model, nn.Module):
        return getattr(model, "config", None)
    if isinstance(model, (str, os.PathLike)):
        return read_config(os.fspath(model), {}, None, {})[0]
    if hasattr(model, "to_dict") and hasattr(model, "model_type"):
        return model
    raise ContractError(
        f"model={short(model)} is of type {type(model).__name__}; pass a model, its config, a folder, or the id of a model on the Hub"
    )


def build(model: Any, base: str, keep: Sequence[str], auto_class: Any) -> nn.Module:
    """A model without values, in the storage that ``base`` names. Runs inside a ``DryRun``.

    The model is on torch's default device. A quantised layer has the tensors that bitsandbytes would have, with the same shapes and dtypes: codes, maxima, and for NF4 the
    codes and maxima of the maxima. No weight is quantised.

    Args:
        model: A model, which is copied without its values; a config; or a folder or id, whose config is read.
        base: As for ``load_base``.
        keep: As for ``load_base``.
        auto_class: As for ``load_base``.

    Raises:
        ContractError: An argument is unknown, or does not fit the others.
    """
    require_base(base)
    require_bitsandbytes(base)
    if isinstance(model, nn.Module):
        device, stored = torch.get_default_device(), stored_kind(getattr(model, "config", None))
        if device.type == "meta" and stored in QUANTISED:
            raise ContractError(
                f"model is a {type(model).__name__} that is stored in {stored} on the CPU, which cannot be planned for another device; "
                "pass its folder, id or config with base="
            )
        copied = copy.deepcopy(model).to(device)
        return copied if base == "auto" else _in_storage(copied, base, keep)
    config = copy.deepcopy(config_of(model))
    stored = stored_kind(config)
    require_compatible(base, stored, tuple(keep), short(model))
    if stored is not None:
        base = _known_storage(stored)
        del config.quantization_config
    dtype = DTYPES.get(base) or _dtype_of(config)
    return _in_storage(_new_model(config, auto_class, dtype), base, keep)


def adapted(model: nn.Module, configs: Sequence[Any], options: dict[str, Any]) -> nn.Module:
    """``model`` with what ``configs`` say: adapters, or all or some of its own weights trained.

    Raises:
        ContractError: A string among ``configs`` is unknown or not alone, or nothing is trained.
    """
    names = [config for config in configs if isinstance(config, str)]
    if names and (len(configs) > 1 or names[0] not in (FULL, PARTIAL)):
        raise ContractError(
            f"{short(names[0])} cannot be planned; pass configs of PEFT, or one of {FULL!r} (every weight is trained) and {PARTIAL!r} "
            "(what requires a gradient in the model)"
        )
    if names == [FULL]:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    elif not names and not (hasattr(model, "peft_config") and not configs):
        model = wrap(model, *configs, **options)
    if not any(p.requires_grad for p in model.parameters()):
        raise ContractError("no parameter of the model requires a gradient; pass a config")
    return model


def _new_model(config: Any, auto_class: Any, dtype: torch.dtype) -> Any:
    if auto_class is None and not getattr(config, "architectures", None):
        return _with_first_head(config, dtype)
    cls = model_class(config, auto_class, config.name_or_path, {}, None)
    return cls._from_config(config, dtype=dtype)


def _with_first_head(config: Any, dtype: torch.dtype) -> Any:
    import transformers

    for head in _HEADS:
        auto = getattr(transformers, f"AutoModelFor{head}")
        if type(config) in auto._model_mapping:
            return auto.from_config(config, dtype=dtype)
    raise ContractError(
        f"the config of {config.model_type!r} names no architecture and no class with a head is known for it; pass auto_class"
    )


def _dtype_of(config: Any) -> torch.dtype:
    named = getattr(config, "dtype", None)
    if named is None and hasattr(config, "get_text_config"):
        named = getattr(config.get_text_config(decoder=True), "dtype", None)
    if named is None:
        return torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


def _known_storage(stored: str) -> str:
    if stored not in QUANTISED:
        raise ContractError(
            f"the checkpoint is stored as {stored!r}, which cannot be planned; plan its original with base='nf4', 'int8' or 'fp8'"
        )
    return stored


def _in_storage(model: nn.Module, base: str, keep: Sequence[str]) -> nn.Module:
    if base == "fp8":
        to_fp8(model, keep)
        return model
    return convert(model, base, tuple(keep), None, None, has_values=False)
