"""Strict loading of a PEFT checkpoint: every key must fit, otherwise the model stays unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit.adapter_config import check_sizes, check_values, largest_size, odd_fields, ranks
from peftkit.adapter_files import (
    CONFIG_FILE,
    read_config,
    read_tensors,
    require_adapter_name,
    require_model,
    weights_file,
)
from peftkit.errors import ContractError, count, listing
from peftkit.find.stacks import as_plain_parameters
from peftkit.find.ties import embeddings_answered, tie_copies
from peftkit.inits.reload import restore_base, take_residual
from peftkit.rollback import restoring, writes_base_weights
from peftkit.wrapping import fuse_model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    accelerate: bool = True,
) -> PeftModel:
    """Load a PEFT checkpoint, or raise an error if it does not fit.

    Keys, shapes and kinds of numbers are compared with the tensors that the config creates in the model, before any weight is
    loaded. If anything fails, the model is unchanged: its values, classes and flags are those from before the call.

    Args:
        model: A base model, or a ``PeftModel`` that gets one more adapter. As in PEFT, an adapter added to a ``PeftModel``
            is not active until ``model.set_adapter(adapter_name)``.
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        adapter_name: The name of the adapter in the model.
        is_trainable: Make the adapter trainable. Otherwise it is frozen and the model is set to evaluation mode.
        accelerate: Fuse the new layers afterwards (``peftkit.accelerate``).

    Returns:
        The ``PeftModel`` around ``model``, or ``model`` itself if it is one.

    Raises:
        ContractError: A file is missing, unreadable or contains code; the config does not fit the model; or tensors are missing,
            unexpected, of a wrong shape or kind, or not finite.
    """
    from peft import PeftModel

    require_model(model, path, "load_adapter(model, path)")
    _check_room(model, adapter_name)
    checkpoint = _Checkpoint(Path(path), model)
    if is_trainable and checkpoint.config.is_prompt_learning:
        raise ContractError(
            "is_trainable=True: PEFT cannot continue to train a loaded prompt-learning adapter; load it for inference, "
            "or train a new one"
        )
    offloaded = _is_offloaded(model)
    if offloaded or checkpoint.may_be_too_large():
        _check_fits(model, checkpoint, adapter_name)

    config = checkpoint.config
    config.inference_mode = not is_trainable
    residual = None if offloaded else take_residual(model, config, checkpoint.folder)
    with restoring(model, copy_values=writes_base_weights(config)):
        with checkpoint.applied_to(model), embeddings_answered(model):
            if offloaded:
                # PEFT removes the offloading hooks first and adds them to the new layers afterwards.
                loaded = PeftModel.from_pretrained(
                    model, str(checkpoint.folder), adapter_name, is_trainable=is_trainable
                )
            else:
                loaded = _inject(model, config, adapter_name)
                has_own_names = _compare(loaded, checkpoint, adapter_name)
                if residual is not None:
                    restore_base(loaded, adapter_name, residual)
                with _without_renaming() if has_own_names else nullcontext():
                    loaded.load_adapter(
                        str(checkpoint.folder),
                        adapter_name,
                        is_trainable=is_trainable,
                        key_mapping=checkpoint.key_mapping,
                    )
                if is_trainable and loaded is model:
                    loaded.set_requires_grad(adapter_name)
        if accelerate:
            fuse_model(loaded)
        else:
            tie_copies(loaded)
        return loaded


def check_fits(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Raise ``ContractError`` unless ``load_adapter`` can load this checkpoint into this model. Both stay unchanged.

    Args:
        model: As for ``load_adapter``; it may be on the meta device, without weights.
        path: As for ``load_adapter``.
        adapter_name: As for ``load_adapter``.

    Raises:
        ContractError: The checkpoint cannot be loaded; the message says why.
    """
    require_model(model, path, "check_fits(model, path)")
    _check_fits(model, _Checkpoint(Path(path), model), adapter_name)


class _Undo(Exception):
    """Ends a trial, so that ``restoring`` restores the model."""


def _check_fits(model: nn.Module, checkpoint: _Checkpoint, adapter_name: str) -> None:
    """Inject the adapter without weights, compare its tensors, and restore the model."""
    config = copy.deepcopy(checkpoint.config)
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        # The shapes are the same, and initialisations such as PiSSA would decompose weights.
        vars(config)["init_lora_weights"] = True
    try:
        with restoring(model):
            with checkpoint.applied_to(model), embeddings_answered(model):
                _compare(_inject(model, config, adapter_name, empty=True), checkpoint, adapter_name)
            raise _Undo
    except _Undo:
        pass


class _Checkpoint:
    """The config and tensors in a folder, checked as far as possible without the model's layers.

    Attributes:
        folder: The folder.
        config: The config as an instance of PEFT's class.
        tensors: The tensors on the CPU, by the keys that PEFT uses for this model.
        key_mapping: The renaming that transformers applies to keys of older checkpoints of this model.
    """

    def __init__(self, folder: Path, model: nn.Module):
        from peft.utils.save_and_load import load_peft_weights

        self.folder = folder
        self._file = folder / CONFIG_FILE
        self._written = read_config(folder)
        check_values(self._file, self._written)
        self.config = self._peft_config()
        self.key_mapping: dict[str, str] | None = (
            None
            if self.config.is_prompt_learning
            else getattr(model, "_checkpoint_conversion_mapping", None)
        )
        self.tensors = read_tensors(
            weights_file(folder, _WEIGHT_FILES),
            lambda: load_peft_weights(str(folder), "cpu", key_mapping=self.key_mapping),
        )
        check_sizes(self._file, self._written, sum(t.numel() for t in self.tensors.values()))

    def _peft_config(self) -> PeftConfig:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        if "peft_type" not in self._written:
            raise ContractError(
                f"{self._file} is not a PEFT config: it has no peft_type; save the adapter again"
            )
        peft_type = self._written["peft_type"]
        if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            known = sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING)
            raise ContractError(
                f"{self._file}: peft_type={peft_type!r} is unknown to the installed PEFT, which knows {', '.join(known)}"
            )
        try:
            return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(str(self.folder))
        except Exception as error:
            raise ContractError(
                f"{self._file} is not a valid {peft_type} config: {self._why(error, peft_type)}"
            ) from error

    def may_be_too_large(self) -> bool:
        """Whether the config may create larger tensors than those in the checkpoint, which would have to be allocated."""
        sizes = {size for tensor in self.tensors.values() for size in tensor.shape}
        return largest_size(self._written) > max(sizes, default=0) or not sizes.issuperset(
            ranks(self._written)
        )

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Turn an error inside PEFT into a ``ContractError`` that names this checkpoint and this model."""
        try:
            yield
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(
                f"the adapter in {self.folder} cannot be applied to {_name(model)}, which was left unchanged: "
                f"{self._why(error, self._written['peft_type'])}"
            ) from error

    def _why(self, error: Exception, peft_type: str) -> str:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        said = " ".join(str(error).split())
        # The text of a KeyError is only the key.
        said = said if said and not isinstance(error, KeyError) else repr(error)
        odd = odd_fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], self._written)
        if not odd:
            return said
        return f"{said}\nUnexpected values in {CONFIG_FILE}:\n{listing(odd)}\nCorrect them, or save the adapter again."


def _check_room(model: nn.Module, adapter_name: str) -> None:
    """Raise ``ContractError`` unless an adapter of this name can be added to the model."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    require_adapter_name(adapter_name)
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ContractError(
                f"adapter_name={adapter_name!r} is already in the model; pass another adapter_name, or call "
                f"model.delete_adapter({adapter_name!r}) first"
            )
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContractError(
            "model already has adapter layers but is not a PeftModel; pass the PeftModel around it, or the plain base "
            "model that PeftModel.unload() returns"
        )


def _name(model: nn.Module) -> str:
    """The class of the base model."""
    from peft import PeftModel

    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps some of the weights on the CPU or the disk while they are not used."""
    devices = getattr(model, "hf_device_map", None) or {}
    return not {"cpu", "disk"}.isdisjoint(devices.values())


def _inject(
    model: nn.Module, config: PeftConfig, adapter_name: str, *, empty: bool = False
) -> PeftModel:
    """Create the adapter's layers, as ``PeftModel.from_pretrained`` does before it loads their weights.

    Args:
        model: Changed in place.
        config: Changed in place, because PEFT resolves its ``target_modules``.
        adapter_name: A name that the model does not have yet.
        empty: Create the layers on the meta device, without allocating memory.
    """
    from peft import PeftModel, PeftType
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    # Methods other than LoRA compute values while they create their layers, which fails on the meta device.
    meta = empty and config.peft_type == PeftType.LORA
    with as_plain_parameters(model), torch.device("meta") if meta else nullcontext():
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config, low_cpu_mem_usage=empty)
            return model
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        return kind(model, config, adapter_name, low_cpu_mem_usage=empty)


def _compare(model: PeftModel, checkpoint: _Checkpoint, adapter_name: str) -> bool:
    """Compare the tensors of the checkpoint with those that the adapter has in the model.

    Returns:
        Whether they have the model's own names. PEFT renames the keys of checkpoints from before transformers 5, which have separate
        weights for each expert, and some rules also change names that need no change (``shared_experts`` of Laguna).

    Raises:
        ContractError: They are not exactly these.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    wanted = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    found = dict(checkpoint.tensors)
    has_own_names = found.keys() == wanted.keys()
    if not has_own_names:
        found = convert_peft_adapter_state_dict_for_transformers(
            model=model,
            peft_config=checkpoint.config,
            adapter_state_dict=found,
            adapter_name=adapter_name,
        )
    known = wanted
    if found.keys() - wanted.keys() and hasattr(model, "get_input_embeddings"):
        # PEFT saves whole embeddings with an adapter that targets or resizes them.
        known = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=True
        )
    problems = _problems(found, wanted, known)
    if problems:
        trained_on = checkpoint.config.base_model_name_or_path or "a model without a name"
        raise ContractError(
            f"{checkpoint.folder} does not fit {_name(model)}, which was left unchanged.\n"
            + "\n".join(problems)
            + f"\nIt was trained on {trained_on!r}: load that model, or an adapter made for this one; if only the config is wrong "
            f"(target_modules, r, modules_to_save), correct {CONFIG_FILE}."
        )
    return has_own_names


@contextmanager
def _without_renaming() -> Iterator[None]:
    """PEFT loads keys as they are."""
    from peft.utils import transformers_weight_conversion

    module: Any = transformers_weight_conversion
    before = module.convert_peft_adapter_state_dict_for_transformers

    def same(*, adapter_state_dict: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return adapter_state_dict

    module.convert_peft_adapter_state_dict_for_transformers = same
    try:
        yield
    finally:
        module.convert_peft_adapter_state_dict_for_transformers = before


def _problems(
    found: dict[str, Tensor], wanted: dict[str, Tensor], known: dict[str, Tensor]
) -> list[str]:
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - known.keys())
    both = sorted(found.keys() & known.keys())
    shapes = [
        f"{key}: {list(found[key].shape)} in the checkpoint, {list(known[key].shape)} in the model"
        for key in both
        if found[key].shape != known[key].shape
    ]
    kinds = [
        f"{key}: {found[key].dtype} in the checkpoint, {known[key].dtype} in the model"
        for key in both
        if _kind(found[key]) != _kind(known[key])
    ]
    overflows = [
        f"{key}: {found[key].abs().max().item():g} is too large for the model's {known[key].dtype}"
        for key in both
        if _overflows(found[key], known[key].dtype)
    ]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of {count(len(wanted), 'key')} {_are(missing)} missing:\n{listing(missing)}"
        )
    if unexpected:
        problems.append(
            f"{count(len(unexpected), 'key')} {_are(unexpected)} left over:\n{listing(unexpected)}"
        )
    for lines, what in (
        (shapes, "the wrong shape"),
        (kinds, "the wrong kind of numbers"),
        (overflows, "too large values"),
    ):
        if lines:
            problems.append(
                f"{count(len(lines), 'tensor')} {'has' if len(lines) == 1 else 'have'} {what}:\n{listing(lines)}"
            )
    return problems


def _are(things: list[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _kind(tensor: Tensor) -> str:
    """The kind of a tensor's numbers. A cast within a kind loses precision at most, no part of the numbers."""
    if tensor.is_floating_point():
        return "float"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype is torch.bool else "integer"


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether some values of a tensor become infinite in a narrower dtype."""
    if not (tensor.is_floating_point() and dtype.is_floating_point) or tensor.numel() == 0:
        return False
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return False
    return not bool(tensor.to(dtype).isfinite().all())
