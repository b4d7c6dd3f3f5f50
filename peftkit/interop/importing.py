"""``import_adapter``: recognise which library saved a checkpoint, and import the checkpoint as an adapter of peftkit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peftkit.adapter_files import require_adapter_name, require_model
from peftkit.errors import ContractError, count, listing
from peftkit.interop.adapterhub import import_bottlenecks
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.interop.prefix_tuning import import_prefix
from peftkit.rollback import restoring

if TYPE_CHECKING:
    from peft import PeftModel


def import_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Import a checkpoint of PEFT's prefix tuning or AdapterHub's bottleneck adapters.

    The imported adapter has the outputs of the other library, up to rounding. A checkpoint for which this is impossible raises
    an error with the reason. ``save_pretrained`` of the result writes peftkit's format, which ``load_adapter`` and PEFT (after
    ``import peftkit.bridge``) can read. AdapterHub applies its adapters after the dropout of a sub-layer, peftkit before this
    dropout. The two therefore differ if the adapter is trained further with dropout.

    Args:
        model: The base model that the adapter was trained on, without adapters.
        path: A folder with ``adapter_config.json`` and the weights. PEFT's weights are in ``adapter_model.safetensors`` (or
            ``.bin``), AdapterHub's in ``adapter.safetensors`` (or ``pytorch_adapter.bin``).
        adapter_name: The adapter's name in the model.
        is_trainable: Whether the adapter can be trained further. If False, the adapter is frozen and the model is put in
            evaluation mode.

    Returns:
        The ``PeftModel`` around ``model``.

    Raises:
        ContractError: A file is missing, the checkpoint cannot be computed exactly, or it does not fit the model. The model
            is unchanged after an error.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    require_model(model, path, "import_adapter(model, path)")
    require_adapter_name(adapter_name)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContractError(
            "the model already has adapters; import into a base model without adapters, save the result, and load it into this "
            "model with peftkit.load_adapter"
        )
    checkpoint = read_checkpoint(path)
    _require_floating_point(checkpoint)
    importer = _importer(checkpoint)
    with restoring(model):
        try:
            imported = importer(model, checkpoint, adapter_name)
        except ValueError:
            raise
        except Exception as error:
            raise ContractError(
                f"{checkpoint.folder} cannot be imported into {type(model).__name__} ({error!r}); the adapter's config or "
                "weights are damaged; copy or save the adapter again. The model is unchanged."
            ) from error
    if not is_trainable:
        imported.requires_grad_(False)
        imported.eval()
        imported.peft_config[adapter_name].inference_mode = True
    return imported


def _require_floating_point(checkpoint: Checkpoint) -> None:
    odd = [f"{k}: {t.dtype}" for k, t in checkpoint.tensors.items() if not t.is_floating_point()]
    if odd:
        raise ContractError(
            f"{count(len(odd), 'tensor')} in {checkpoint.weights} cannot be adapter weights, which have a floating-point "
            f"dtype:\n{listing(odd)}\nSave the adapter again."
        )


def _importer(checkpoint: Checkpoint):
    config, where = checkpoint.config, checkpoint.folder
    peft_type = config.get("peft_type")
    if peft_type == "PREFIX_TUNING":
        return import_prefix
    if peft_type is not None:
        raise ContractError(
            f"{where} is a {peft_type} adapter, which needs no import; load it with peftkit.load_adapter(model, path)"
        )
    if isinstance(config.get("config"), dict):
        return import_bottlenecks
    raise ContractError(
        f"{where}/adapter_config.json has neither the field peft_type (PEFT) nor the field config (AdapterHub), so the library "
        f"that saved it is unknown; its fields are: {', '.join(sorted(config)) or 'none'}; pass a folder saved by PEFT or "
        "AdapterHub"
    )
