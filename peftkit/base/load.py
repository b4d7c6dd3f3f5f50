"""``load_base``: one call for a base model in 16 or 32 bits, or quantised while it is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftkit.base.checkpoint import load_checkpoint
from peftkit.base.inplace import convert
from peftkit.base.keep import require_keep
from peftkit.base.kinds import Base, require_base, require_bitsandbytes
from peftkit.base.memory import give_back
from peftkit.base.summary import base_report
from peftkit.errors import ContractError, short
from peftkit.fuse.uneven_rows import LoadedToDecode, decode_as_stored

logger = logging.getLogger(__name__)


def load_base(
    model_or_path: str | os.PathLike[str] | nn.Module,
    base: Base = "auto",
    keep: Sequence[str] = (),
    *,
    auto_class: Any = None,
    dtype: torch.dtype | str = "auto",
    compute_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a base model, in 16 or 32 bits or quantised while it is read.

    Each weight is read, quantised and freed before the next one, so that the memory needed is that of the loaded model and at most 1.2
    times the largest tensor. For ``"nf4"`` and ``"int8"`` the stored codes equal, bit for bit, those of ``from_pretrained`` with
    ``BitsAndBytesConfig`` (NF4, double quantisation, blocks of 64; or 8 bits), and so do the attributes by which transformers, PEFT, Trainer
    and TRL recognise a quantised model: ``save_pretrained``, ``prepare_model_for_kbit_training`` and ``peftkit.wrap`` work as on theirs.
    For ``"fp8"`` the model equals, bit for bit, the one that ``to_fp8`` makes of the unquantised model.

    Embeddings, norms, output and task heads, routers, and what ``keep`` names are not quantised; ``base_report(model)`` lists them with the
    reason. Experts that are stacked in one parameter are quantised by ``"nf4"``, as bitsandbytes' ``replace_parameter_4bit`` does; transformers
    alone leaves them in 16 bits, and only ``load_base`` reads a checkpoint that has them in 4 bits.

    Args:
        model_or_path: The id of a model on the Hub, a folder with safetensors files, or a model, whose linear layers are then replaced
            one after the other, in place.
        base: ``"auto"`` loads the checkpoint as it is: quantised if it was saved so, otherwise in the dtype of its config. ``"bf16"``,
            ``"fp16"`` and ``"fp32"`` choose the dtype; ``"int8"``, ``"nf4"`` and ``"fp8"`` quantise the linear layers, ``"nf4"`` also stacked
            experts.
        keep: Linear layers, and with ``"nf4"`` stacks of experts, that should not be quantised: names, ends of names (``"down_proj"``),
            patterns (``"model.layers.0.*"``, not for ``"fp8"``), or modules that contain them.
        auto_class: The class of the model, or an Auto class of transformers, or the name of one. Default: the class that the config
            names in ``architectures``.
        dtype: Dtype of what is not quantised. ``"auto"`` is the dtype of the config, or that of the checkpoint if the config has none.
        compute_dtype: Dtype in which NF4 layers multiply. Default: that of what is not quantised, so that nothing is cast; for a
            checkpoint that is already quantised, what it says.
        device: Where the model should be. Default: the current CUDA device if there is one, otherwise the CPU.
        strict: Raise if the checkpoint has no tensor for a weight, or tensors that the model does not have. ``False`` initialises such
            weights at random and ignores such tensors, with a warning of transformers. Weights of heads may be missing, and those of
            others left over, if ``auto_class`` is another class than that of the checkpoint. Heads of another size than those of the
            checkpoint are new if ``num_labels`` or ``id2label`` was passed.
        kwargs: Arguments of ``from_pretrained`` such as ``revision``, ``token``, ``attn_implementation``, ``trust_remote_code`` or
            ``num_labels``.

    Returns:
        The model in evaluation mode; a model that was passed keeps its mode.

    Raises:
        ContractError: An argument is wrong or does not fit the checkpoint; a file is missing, truncated or unreadable; a weight is
            missing, of another shape, NaN or infinite. The message names the file and the tensor. Nothing half loaded is returned.
    """
    require_base(base)
    require_bitsandbytes(base)
    entries = require_keep(keep)
    if isinstance(model_or_path, nn.Module):
        _require_no_loading(auto_class=auto_class, device=device, **kwargs)
        model = convert(model_or_path, base, entries, dtype_of(dtype), dtype_of(compute_dtype))
    elif isinstance(model_or_path, (str, os.PathLike)):
        model = load_checkpoint(
            os.fspath(model_or_path),
            base,
            entries,
            auto_class=auto_class,
            dtype=dtype_of(dtype),
            compute_dtype=dtype_of(compute_dtype),
            device=device,
            strict=strict,
            kwargs=kwargs,
        )
    else:
        raise ContractError(
            f"model_or_path={short(model_or_path)} is of type {type(model_or_path).__name__}; pass a folder, the id of a model on the "
            "Hub, or a model"
        )
    decode_as_stored(model, LoadedToDecode)
    give_back()
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", base_report(model))
    return model


def dtype_of(value: Any) -> torch.dtype | None:
    """The dtype that a user means; ``None`` for ``"auto"``.

    Raises:
        ContractError: It is not a floating-point dtype of 16 or 32 bits.
    """
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ContractError(
            f"dtype={short(value)} is not one of torch.bfloat16, torch.float16 and torch.float32"
        )
    return dtype


def _require_no_loading(**given: Any) -> None:
    useless = [name for name, value in given.items() if value is not None]
    if useless:
        raise ContractError(
            f"{', '.join(useless)} cannot be used with a model that is already loaded; pass a folder or an id, or remove them"
        )
