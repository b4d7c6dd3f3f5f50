"""``import_adapter``: which library wrote a checkpoint, and what of ours computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peftkit.errors import ContractError
from peftkit.interop.adapterhub import import_bottlenecks
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.interop.prefix_tuning import import_prefix

if TYPE_CHECKING:
    from peft import PeftModel


def import_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Turn a checkpoint of PEFT's prefix tuning or of AdapterHub's bottleneck adapters into an adapter of ours.

    The adapter computes what the other library computes, up to rounding; a checkpoint for which that is not so is refused with
    the reason. ``save_pretrained`` of the result writes our format, which ``load_adapter`` and PEFT (after
    ``import peftkit.bridge``) read. AdapterHub applies its adapters after a sub-layer's dropout and we before it, which only
    shows when the adapter is trained further with dropout.

    Args:
        model: The base model the adapter was trained on, without adapters.
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``) as PEFT writes them, or
            ``adapter.safetensors`` (or ``pytorch_adapter.bin``) as AdapterHub does.
        adapter_name: The name it gets in the model.
        is_trainable: Go on training the adapter; otherwise it is frozen and the model put in evaluation mode.

    Returns:
        The ``PeftModel`` around ``model``.

    Raises:
        ContractError: A file is missing, the checkpoint is of a kind that cannot be computed exactly, or it does not fit the
            model; the model is left as it was.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContractError(
            "model carries adapters already: import into the plain base model, save the result, and add that to the other "
            "model by peftkit.load_adapter"
        )
    checkpoint = read_checkpoint(path)
    imported = _importer(checkpoint)(model, checkpoint, adapter_name)
    if not is_trainable:
        imported.requires_grad_(False)
        imported.eval()
        imported.peft_config[adapter_name].inference_mode = True
    return imported


def _importer(checkpoint: Checkpoint):
    config, where = checkpoint.config, checkpoint.folder
    peft_type = config.get("peft_type")
    if peft_type == "PREFIX_TUNING":
        return import_prefix
    if peft_type is not None:
        raise ContractError(
            f"{where} is a {peft_type} adapter, which needs no import; read it by peftkit.load_adapter(model, path)"
        )
    if isinstance(config.get("config"), dict):
        return import_bottlenecks
    raise ContractError(
        f"{where}/adapter_config.json has neither peft_type (PEFT) nor config (AdapterHub), so it is not known what wrote it; "
        f"it has {', '.join(sorted(config)) or 'nothing'}"
    )
