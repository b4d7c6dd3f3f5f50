"""Strict loading of a PEFT checkpoint: every key must fit, or the model stays what it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, listing
from peftkit.wrapping import accelerate as fuse

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    accelerate: bool = True,
) -> PeftModel:
    """Load a PEFT checkpoint and insist that it fits.

    The checkpoint is compared with what its config would create, on a weightless copy of the model, before the model itself
    is touched. A failed load therefore leaves the model as it was, bit for bit.

    Args:
        model: A base model, or a ``PeftModel`` that gets one more adapter. As in PEFT, an adapter added to a ``PeftModel``
            is not active until ``model.set_adapter(adapter_name)``.
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        adapter_name: The name it gets in the model.
        is_trainable: Go on training the adapter; otherwise it is frozen and the model put in evaluation mode.
        accelerate: Fuse the new layers afterwards (``peftkit.accelerate``).

    Returns:
        The ``PeftModel`` around ``model``, or ``model`` itself where it was one.

    Raises:
        ContractError: A file is missing or unreadable, the config does not fit the model, or keys are missing, unexpected,
            wrongly shaped or not finite.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not adapter_name or "." in adapter_name:
        raise ContractError(f"adapter_name={adapter_name!r}: use a non-empty name without dots")
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ContractError(
                f"adapter_name={adapter_name!r} is already in the model; pass another adapter_name, or call "
                f"model.delete_adapter({adapter_name!r}) first"
            )
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContractError(
            "model already carries adapter layers but is not a PeftModel; pass the PeftModel around it, or the plain base "
            "model that PeftModel.unload() returns"
        )
    folder = Path(path)
    config = _read_config(folder)
    _check_fits(folder, model, config, _read_tensors(folder, model, config), adapter_name)

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        loaded = model
    else:
        loaded = PeftModel.from_pretrained(
            model, str(folder), adapter_name, is_trainable=is_trainable
        )
    if accelerate:
        fuse(loaded)
    return loaded


def check_fits(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Raise unless ``load_adapter`` would load this checkpoint into this model; both stay as they are.

    Args:
        model: As for ``load_adapter``; it may be on the meta device, without weights.
        path: As for ``load_adapter``.
        adapter_name: As for ``load_adapter``.

    Raises:
        ContractError: It would not; the message says why.
    """
    folder = Path(path)
    config = _read_config(folder)
    _check_fits(folder, model, config, _read_tensors(folder, model, config), adapter_name)


def _read_config(folder: Path) -> PeftConfig:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / _CONFIG_FILE
    if not folder.is_dir():
        raise ContractError(
            f"path={str(folder)!r} is not a folder; download adapters from a hub first "
            "(huggingface_hub.snapshot_download returns the folder)"
        )
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ContractError(
            f"{file} does not exist; path must be a folder written by save_pretrained of a PeftModel (it holds {held})"
        )
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        peft_type = written["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{file} is not a PEFT config ({error!r}); save the adapter again"
        ) from error
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ContractError(
            f"{file}: peft_type={peft_type!r} is unknown to the installed PEFT, which knows {known}"
        )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ContractError(f"{file} is not a valid {peft_type} config: {error}") from error


def _read_tensors(folder: Path, model: nn.Module, config: PeftConfig) -> dict[str, Tensor]:
    """Read the weights on the CPU, under the keys PEFT would use."""
    import pickle

    from peft.utils.save_and_load import load_peft_weights
    from safetensors import SafetensorError

    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ContractError(
            f"{folder} holds neither {' nor '.join(_WEIGHT_FILES)}; copy the weights next to the config"
        )
    renamed = (
        None
        if config.is_prompt_learning
        else getattr(model, "_checkpoint_conversion_mapping", None)
    )
    try:
        tensors = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ContractError(
            f"{file} cannot be read ({error}); it is damaged or incomplete, copy or save it again"
        ) from error
    if not tensors:
        raise ContractError(f"{file} holds no tensors; save the adapter again")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ContractError(
            f"{len(bad)} tensors of {file} hold NaN or infinite values, so training had already diverged:\n"
            f"{listing(bad)}\nLoad an earlier checkpoint."
        )
    return tensors


def _check_fits(
    folder: Path,
    model: nn.Module,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    adapter_name: str,
) -> None:
    from peft import get_peft_model_state_dict

    skeleton = _dry_injection(folder, model, config, adapter_name)
    found = _renamed_for_transformers(skeleton, config, tensors, adapter_name)
    wanted = get_peft_model_state_dict(
        skeleton, adapter_name=adapter_name, save_embedding_layers=False
    )
    known = wanted
    if found.keys() - wanted.keys() and hasattr(skeleton, "get_input_embeddings"):
        # PEFT saves whole embeddings next to an adapter that targets or resizes them.
        known = get_peft_model_state_dict(
            skeleton, adapter_name=adapter_name, save_embedding_layers=True
        )

    problems = []
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - known.keys())
    shapes = {
        key: f"{key}: {list(found[key].shape)} in the checkpoint, {list(known[key].shape)} in the model"
        for key in sorted(found.keys() & known.keys())
        if found[key].shape != known[key].shape
    }
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} keys are missing:\n{listing(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are left over:\n{listing(unexpected)}")
    if shapes:
        problems.append(
            f"{len(shapes)} tensors have the wrong shape:\n{listing(list(shapes.values()))}"
        )
    if problems:
        trained_on = config.base_model_name_or_path or "a model without a name"
        raise ContractError(
            f"{folder} does not fit {type(model).__name__}, which was left unchanged.\n"
            + "\n".join(problems)
            + f"\nIt was trained on {trained_on!r}: load that model, or an adapter made for this one; where only the config "
            f"is wrong (target_modules, r, modules_to_save), correct {_CONFIG_FILE}."
        )


def _dry_injection(
    folder: Path, model: nn.Module, config: PeftConfig, adapter_name: str
) -> PeftModel:
    """Build what the config makes of the model, without weights."""
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    config = copy.deepcopy(config)
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        # Shapes are the same, and PiSSA and the like would decompose weights.
        vars(config)["init_lora_weights"] = True
    skeleton: Any = _without_weights(model)
    try:
        with torch.random.fork_rng(devices=[]):
            if isinstance(skeleton, PeftModel):
                skeleton.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
            else:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                skeleton = kind(skeleton, config, adapter_name, low_cpu_mem_usage=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ContractError(
            f"the config of {folder} cannot be applied to {type(model).__name__}: {error}"
        ) from error
    return skeleton


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, with every parameter and buffer on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        # The subclass and its attributes (such as bitsandbytes' quantisation state) tell PEFT which layer to build.
        empty = torch.Tensor._make_subclass(
            type(parameter), parameter.detach().to("meta"), parameter.requires_grad
        )
        vars(empty).update(vars(parameter))
        memo[id(parameter)] = empty
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def _renamed_for_transformers(
    skeleton: PeftModel, config: PeftConfig, tensors: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """Apply PEFT's conversion of checkpoints made before transformers 5 (experts stored one by one)."""
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    return convert_peft_adapter_state_dict_for_transformers(
        model=skeleton,
        peft_config=config,
        adapter_state_dict=dict(tensors),
        adapter_name=adapter_name,
    )
