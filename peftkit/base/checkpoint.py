"""Load a checkpoint through transformers, with its tensors read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.base.classes import model_class
from peftkit.base.files import HUB_ARGUMENTS, open_checkpoint
from peftkit.base.kinds import (
    DTYPES,
    FLOAT8,
    QUANTISED,
    bitsandbytes_settings,
    quantization_settings,
    require_compatible,
    stored_kind,
)
from peftkit.base.shards import Stop, StoredTensor
from peftkit.errors import ContractError, listing, short
from peftkit.fp8 import Float8Linear

_REPLACED = {
    "quantization_config": "base= and keep=",
    "load_in_4bit": "base='nf4'",
    "load_in_8bit": "base='int8'",
    "torch_dtype": "dtype=",
    "state_dict": "load_base(model, ...) after loading the state dict",
    "gguf_file": "transformers' from_pretrained, then load_base(model, ...)",
    "output_loading_info": "strict=, which raises an error for what would be reported",
    "ignore_mismatched_sizes": "transformers' from_pretrained, then load_base(model, ...)",
}
"""Arguments of ``from_pretrained`` that ``load_base`` does not have, and what to use instead."""


def load_checkpoint(
    path: str,
    base: str,
    keep: tuple[str, ...],
    *,
    auto_class: Any,
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    device: Any,
    strict: bool,
    kwargs: dict[str, Any],
    as_state_dict: Callable[[Mapping[str, StoredTensor]], dict[str, Any]] = dict,
) -> Any:
    """Load a model from a folder or from the Hub; ``load_base`` describes the other arguments and the errors.

    Args:
        as_state_dict: Returns what transformers reads for each tensor. Default: the tensors, which are read one at a time.
    """
    _require_arguments(base, dtype, device, kwargs)
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    variant = kwargs.pop("variant", None)
    device_map = {"": _device(device if device is not None else kwargs.pop("device_map", None))}
    for_model = {
        name: kwargs.pop(name)
        for name in ("attn_implementation", "experts_implementation")
        if name in kwargs
    }
    trust = kwargs.pop("trust_remote_code", None)
    config, unused = read_config(path, hub, trust, kwargs)
    cls = model_class(config, auto_class, path, hub, trust)
    stored = stored_kind(config)
    require_compatible(base, stored, keep, path)
    if stored is not None and stored not in (*QUANTISED, "fp4"):
        # Methods of other packages, which PEFT adapts by its own layers.
        if compute_dtype is not None:
            raise ContractError(
                f"compute_dtype={compute_dtype}, but {path} is quantised with {stored}"
            )
        settings = {"device_map": device_map, "dtype": dtype or "auto", "variant": variant}
        return cls.from_pretrained(path, config=config, **settings, **hub, **for_model, **unused)

    tensors = open_checkpoint(path, hub, variant, getattr(config, "transformers_weights", None))
    for tensor in tensors.values():
        tensor.require_finite = strict
    dtype = DTYPES.get(base) or dtype or _dtype_of(config, tensors)
    settings: dict[str, Any] = {}
    has_pooler = any("pool" in name for name in tensors)
    if base in QUANTISED and stored is None:
        from peftkit.base.streaming import StreamedConfig

        settings["quantization_config"] = StreamedConfig(
            base,
            keep,
            bitsandbytes_settings(base, compute_dtype or dtype),
            has_pooler=has_pooler,
        )
    elif base == FLOAT8:
        from peftkit.base.streaming_fp8 import Float8Config

        settings["quantization_config"] = Float8Config(keep, has_pooler)
    read = dict(tensors)
    if stored == "nf4":
        from peftkit.base.stacks import take_saved

        saved = take_saved(read)
        if saved:
            settings["quantization_config"] = _of_saved(config, saved)
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=as_state_dict(read),
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
            **for_model,
            **unused,
        )
    except Stop as stop:
        raise stop.error from None
    chosen = not {"num_labels", "id2label"}.isdisjoint(kwargs)
    _require_complete(model, info, config, tensors, path, strict, chosen)
    if stored is not None and compute_dtype is not None:
        _set_compute_dtype(model, compute_dtype)
    if stored is not None:
        _let_it_be_saved(model)
    _finish(model, path, hub, trust)
    return model


def _of_saved(config: Any, saved: dict[str, dict[str, StoredTensor]]) -> Any:
    """Take the quantization config out of ``config``, and make from it the one whose quantizer can read stacks of experts."""
    from transformers import BitsAndBytesConfig

    from peftkit.base.streaming import StreamedConfig

    written: Any = BitsAndBytesConfig.from_dict(quantization_settings(config) or {})
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    values = written.to_diff_dict()
    kept = ("load_in_4bit", "bnb_4bit", "llm_int8")
    settings = {name: value for name, value in values.items() if name.startswith(kept)}
    found = StreamedConfig("nf4", (), settings | {"load_in_4bit": True}, saved)
    found.llm_int8_skip_modules = written.llm_int8_skip_modules
    return found


def _require_arguments(base: str, dtype: Any, device: Any, kwargs: Mapping[str, Any]) -> None:
    for name, instead in _REPLACED.items():
        if name in kwargs:
            raise ContractError(f"load_base has no argument {name!r}; use {instead}")
    if base in DTYPES and dtype not in (None, DTYPES[base]):
        raise ContractError(f"base={base!r} and dtype={dtype} contradict each other; remove one")
    if device is not None and "device_map" in kwargs:
        raise ContractError("device and device_map were both given; remove one")


def _device(value: Any) -> torch.device:
    if isinstance(value, Mapping) and len(set(value.values())) == 1:
        value = next(iter(value.values()))
    if value is None:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ContractError(
            f"device={short(value)}: load_base loads onto one device, such as 'cpu' or 'cuda:0'; to distribute a model use transformers' "
            "from_pretrained with device_map"
        ) from error


def read_config(
    path: str, hub: Mapping[str, Any], trust: Any, kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Read ``config.json``; ``kwargs`` replace its values. Also return those that it does not have.

    Raises:
        ContractError: There is no config, or it cannot be read.
    """
    from transformers import AutoConfig

    folder = Path(path, hub.get("subfolder") or "")
    if Path(path).is_file():
        raise ContractError(f"{path} is a file; pass the folder that has it and config.json")
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ContractError(
                f"{folder} is an adapter; load its base model first, then load_adapter(model, {path!r})"
            )
        raise ContractError(
            f"{folder} has no config.json; pass the folder of a checkpoint of transformers"
        )
    try:
        found: Any = AutoConfig.from_pretrained(
            path, return_unused_kwargs=True, trust_remote_code=trust, **hub, **kwargs
        )
        return found
    except (OSError, ValueError) as error:
        raise ContractError(f"the config of {path} cannot be loaded: {error}") from error


def _dtype_of(config: Any, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that the config names, or that of most values in the checkpoint."""
    named = getattr(config, "dtype", None) or getattr(
        config.get_text_config(decoder=True), "dtype", None
    )
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in DTYPES.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


_FOR_LABELS = ("denoising_class_embed.",)
"""Weights of RT-DETR inside the backbone that have the size of the labels. Only training uses them."""


def _is_for_labels(
    name: str, found: Sequence[int], expected: Sequence[int], config: Any, heads: Sequence[str]
) -> bool:
    """Whether a weight of a head has another size only because the caller has chosen other labels."""
    differing = [
        size for before, size in zip(found, expected, strict=False) if int(before) != int(size)
    ]
    inside = any(name.startswith(f"{head}.") for head in heads) or any(
        part in name for part in (_FOR_LABELS if heads else ())
    )
    sizes = (config.num_labels, config.num_labels + 1)
    return len(found) == len(expected) and len(differing) == 1 and differing[0] in sizes and inside


def _require_complete(
    model: nn.Module,
    info: Mapping[str, Any],
    config: Any,
    tensors: Mapping[str, StoredTensor],
    path: str,
    strict: bool,
    chosen_labels: bool,
) -> None:
    """Raise if weights were not in the checkpoint, or tensors of the checkpoint are not in the model."""
    relabelled = _new_modules(model) if chosen_labels else []
    mismatched = [
        f"{name}: {tuple(found)} in the checkpoint, {tuple(expected)} in the model"
        for name, found, expected in sorted(info["mismatched_keys"])
        if not _is_for_labels(name, found, expected, config, relabelled)
    ]
    if mismatched:
        raise ContractError(
            f"tensors of {path} have other shapes than {type(model).__name__}:\n{listing(mismatched)}\n"
            "The config belongs to another checkpoint, or an argument changed a size."
        )
    other_class = type(model).__name__ not in (getattr(config, "architectures", None) or ())
    missing = [name for name in sorted(info["missing_keys"]) if not _is_scale(model, name)]
    unexpected = sorted(info["unexpected_keys"])
    if other_class:
        heads = _new_modules(model)
        missing = [name for name in missing if not name.startswith(tuple(f"{h}." for h in heads))]
        unexpected = []
    lost = [name for name in missing if _is_quantised(model, name)]
    way_out = "Download or copy the checkpoint again, or pass the auto_class that belongs to it"
    if lost or (strict and missing):
        raise ContractError(
            f"{path} has no tensors for these weights of {type(model).__name__}:\n{listing(lost or missing)}\n{way_out}"
            + ("." if lost else "; strict=False initialises them at random.")
        )
    if strict and unexpected:
        shown = [
            f"{name} ({tensors[name].file.name})" if name in tensors else name
            for name in unexpected
        ]
        raise ContractError(
            f"{path} has tensors that {type(model).__name__} does not have:\n{listing(shown)}\n{way_out}; strict=False ignores them."
        )
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise ContractError(
            f"these weights of {type(model).__name__} were not filled:\n{listing(empty)}\n{way_out}."
        )


def _new_modules(model: nn.Module) -> list[str]:
    """The heads that a checkpoint of another class need not have."""
    from peftkit.find.heads import find_heads

    heads = find_heads(model)
    return [*heads.names, *heads.out_of_reach]


def _is_quantised(model: nn.Module, name: str) -> bool:
    """Whether a weight or bias is part of a quantised layer, which transformers does not initialise."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return hasattr(layer, "source_cls") or isinstance(layer, Float8Linear)


def _is_scale(model: nn.Module, name: str) -> bool:
    """Whether this is the scale of a float8 weight, which the checkpoint of an unquantised model does not have."""
    parent, _, own = name.rpartition(".")
    return own == "weight_scale" and isinstance(model.get_submodule(parent), Float8Linear)


def _set_compute_dtype(model: Any, compute_dtype: torch.dtype) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ContractError(
            f"compute_dtype={compute_dtype}, but the model has no 4-bit layers; remove it"
        )
    for layer in layers:
        layer.compute_dtype = compute_dtype
        layer.compute_type_is_set = True
    model.config.quantization_config.bnb_4bit_compute_dtype = compute_dtype


def _let_it_be_saved(model: Any) -> None:
    """Remove the step that read bitsandbytes' storage. transformers would revert it in ``save_pretrained``, which it cannot."""
    steps = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        step
        for step in steps
        if not any(
            type(operation).__name__ in ("Bnb4bitDeserialize", "Bnb8bitDeserialize")
            for operation in getattr(step, "operations", ())
        )
    ]


def _finish(model: Any, path: str, hub: Mapping[str, Any], trust: Any) -> None:
    """What ``from_pretrained`` does with the path: its name, which PEFT saves, and the settings for generation."""
    model.name_or_path = model.config.name_or_path = path
    if not model.can_generate() or not hasattr(model, "generation_config"):
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True, **hub
        )
    if trust and hasattr(model, "load_custom_generate"):
        _load_custom_generate(model, path, hub)


def _load_custom_generate(model: Any, path: str, hub: Mapping[str, Any]) -> None:
    import functools

    try:
        custom = model.load_custom_generate(path, trust_remote_code=True, **hub)
    except OSError:  # the checkpoint has none
        return
    model.generate = functools.partial(custom, model=model)
