"""Quantise the linear layers of a model that is already in memory, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.gguf import forget_gguf
from peftkit.base.keep import choose
from peftkit.base.kinds import (
    DTYPES,
    FLOAT8,
    QUANTISED,
    bitsandbytes_settings,
    require_compatible,
    stored_kind,
)
from peftkit.base.shards import count_not_finite
from peftkit.base.summary import stored_as
from peftkit.errors import ContractError, count
from peftkit.find.modules import is_adapted
from peftkit.fp8 import to_fp8


def convert(
    model: nn.Module,
    base: str,
    keep: tuple[str, ...],
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    has_values: bool = True,
) -> nn.Module:
    """Bring a model into the form ``base``, in place; ``load_base`` describes the arguments.

    Everything is checked before the first layer is replaced. Without ``has_values`` the weights have sizes only: their values are
    neither checked nor quantised.

    Raises:
        ContractError: The model has adapters or no memory, is already quantised, or has weights that are not finite.
    """
    _require_whole(model, has_values)
    forget_gguf(model)
    stored = stored_kind(getattr(model, "config", None)) or _layers_kind(model)
    require_compatible(base, stored, keep, f"this {type(model).__name__}")
    if stored is None and base in QUANTISED:
        if dtype is not None:
            cast(model, dtype)
        _quantise(model, base, keep, compute_dtype, has_values)
    elif base == FLOAT8:
        if dtype is not None:
            cast(model, dtype)
        to_fp8(model, keep)
    elif stored is None:
        target = DTYPES.get(base) or dtype
        if target is not None:
            cast(model, target)
    return model


def _require_whole(model: nn.Module, has_values: bool) -> None:
    if any(is_adapted(module) for module in model.modules()):
        raise ContractError(
            f"this {type(model).__name__} has adapters; call load_base before wrap, or unload them first"
        )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and has_values:
        raise ContractError(
            f"{empty[0]} is on the device meta and has no values; pass the folder of the checkpoint instead of the model"
        )


def _layers_kind(model: nn.Module) -> str | None:
    """How bitsandbytes' layers of the model are stored, or ``None`` if it has none."""
    for parameter in model.parameters():
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):
            return stored_as(parameter)
    return None


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters of a model, one after the other. transformers' exceptions stay in float32; buffers stay as they are."""
    patterns = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    for name, parameter in model.named_parameters():
        kept = any(pattern in name.split(".") for pattern in patterns)
        if parameter.is_floating_point() and not kept:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype


def _quantise(
    model: Any,
    base: str,
    keep: tuple[str, ...],
    compute_dtype: torch.dtype | None,
    has_values: bool,
) -> None:
    from transformers import PreTrainedModel

    names, stacks, skipped = choose(model, keep)
    stacks = stacks if base == "nf4" else []
    layers = {name: model.get_submodule(name) for name in names}
    _require_quantisable(layers, has_values)
    for name in stacks if has_values else ():
        _require_values(name, model.get_parameter(name))
    places = _all_names(model)
    dtypes = [layer.weight.dtype for layer in layers.values()]
    settings = bitsandbytes_settings(base, compute_dtype or max(dtypes, key=dtypes.count))
    for done, name in enumerate(names):
        try:
            new = _replacement(layers.pop(name), name, settings, has_values)
            for place in places[id(model.get_submodule(name))]:
                model.set_submodule(place, new)
        except Exception as error:
            raise ContractError(
                f"{name} could not be quantised: {error}. {count(done, 'layer')} of {len(names)} were quantised before; each layer of the "
                "model is whole, quantised or not. To continue without quantisation, load the model again"
            ) from error
    for name in stacks:
        _pack(model, name, has_values)
    if isinstance(model, PreTrainedModel):
        from peftkit.base.streaming import mark_in_place

        mark_in_place(model, settings, skipped)


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each module; a module that several parents share has several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _require_quantisable(layers: dict[str, Any], has_values: bool) -> None:
    for name, layer in layers.items():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if hasattr(layer, "_hf_hook") or any(getattr(layer, kind, None) for kind in hooks):
            raise ContractError(
                f"{name} has hooks, which a quantised layer would not have; remove them, or load from the checkpoint"
            )
        _require_dtype(f"{name}.weight", layer.weight)
        if has_values:
            _require_values(f"{name}.weight", layer.weight)


def _require_dtype(name: str, weight: Tensor) -> None:
    if weight.dtype not in DTYPES.values():
        raise ContractError(
            f"{name} is {weight.dtype}; bitsandbytes quantises float32, float16 and bfloat16"
        )


def _require_values(name: str, weight: Tensor) -> None:
    _require_dtype(name, weight)
    bad = count_not_finite(weight.detach())
    if bad:
        raise ContractError(
            f"{name} has {count(bad, 'value')} that {'is' if bad == 1 else 'are'} NaN or infinite; repair it, or keep the "
            f"module as it is with keep=[{name.removesuffix('.weight')!r}]"
        )


def _pack(model: Any, name: str, has_values: bool) -> None:
    """Store a stack of experts in 4 bits."""
    from transformers import PreTrainedModel

    from peftkit.base.stacks import attach, pack, pack_nothing, save_under_own_names

    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    weight = getattr(module, own).detach()
    setattr(module, own, pack(weight, name) if has_values else pack_nothing(weight))
    attach(model, name)
    if isinstance(model, PreTrainedModel):
        save_under_own_names(model)


def _replacement(layer: Any, name: str, settings: dict[str, Any], has_values: bool) -> nn.Module:
    """The layer of bitsandbytes with the weight of ``layer``, quantised on its device, and its bias."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    from peftkit.base.quantize import uninitialized
    from peftkit.base.streaming import quantized_weight

    # Conv1D has the transposed weight
    K, N = layer.weight.shape[:: -1 if type(layer) is nn.Linear else 1]
    has_bias = layer.bias is not None
    if "load_in_8bit" in settings:
        new = Linear8bitLt(K, N, has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
    else:
        new = Linear4bit(
            K,
            N,
            has_bias,
            settings["bnb_4bit_compute_dtype"],
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
    new.source_cls = type(layer)
    quantise = quantized_weight if has_values else uninitialized
    new.weight = quantise(layer.weight.detach(), f"{name}.weight", new)
    new.bias = layer.bias
    return new.train(layer.training)
