"""``import_adapter``: which library wrote a checkpoint, and what of ours computes the same."""

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

    require_model(model, path, "import_adapter(model, path)")
    require_adapter_name(adapter_name)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContractError(
            "model carries adapters already: import into the plain base model, save the result, and add that to the other "
            "model by peftkit.load_adapter"
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
                f"{checkpoint.folder} cannot be imported into {type(model).__name__}, which was left unchanged ({error!r}); the "
                "adapter's config or weights are damaged, copy or save it again"
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
            f"{count(len(odd), 'tensor')} of {checkpoint.weights} cannot be weights of an adapter, which are floating-point "
            f"numbers:\n{listing(odd)}\nSave the adapter again."
        )


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
