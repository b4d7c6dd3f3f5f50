"""Putting KV prefixes into a model's attentions, by a child module and a change of class: no module is replaced, no key changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftkit.attention_dispatch import dispatches
from peftkit.find.points import evaluating
from peftkit.find.targets import base_modules, is_cross_attention
from peftkit.injection import device_and_dtype, refuse_peft_fields
from peftkit.prefix.attention import IMPLEMENTATION, RECORD, prefix_attention
from peftkit.prefix.config import PrefixConfig
from peftkit.prefix.module import CHILD, Prefix, PrefixAttention, PrefixSite
from peftkit.prefix.positions import move_positions, restore_positions
from peftkit.swap import swap_in, swap_out

_HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_KEY_NAMES = ("k_proj", "key", "k", "k_lin", "key_proj")


def add_prefixes(model: nn.Module, config: PrefixConfig) -> list[str]:
    """Freeze a model and add KV prefixes to its attentions, without PEFT.

    Args:
        model: A transformers model; changed in place.
        config: How many keys and values, and where.

    Returns:
        Names of the attention modules.

    Raises:
        ValueError: The model's attention does not ask transformers for its function, a named module does not exist, or one
            has a prefix already.
    """
    refuse_peft_fields(config)
    model.requires_grad_(False)
    fill_attentions(model, config)
    modules = dict(base_modules(model))
    new = {}
    for name in config.target_modules or ():
        if name not in modules:
            raise ValueError(f"target_modules: {name!r} is not a module of {type(model).__name__}")
        if hasattr(modules[name], CHILD):
            raise ValueError(f"{name} has a prefix; call remove_prefixes first")
        site = PrefixSite()
        site.adapters["default"] = new[name] = build(modules[name], model, config)
        attach(modules[name], site)
        if config.position_offset:
            move_positions(model, site)
    if config.init == "text":
        fill_from_tokens(model, new, config.init_token_ids or [])
    return list(new)


def remove_prefixes(model: nn.Module) -> dict[str, PrefixSite]:
    """Take all prefixes off a model; returns them by the names of their attentions."""
    found = {}
    for name, module in list(base_modules(model)):
        if isinstance(module, PrefixAttention):
            found[name] = module._modules.pop(CHILD)
            swap_out(module, PrefixAttention)
    restore_positions(model)
    return found


def attach(module: nn.Module, site: PrefixSite) -> None:
    """Make ``site`` the prefixes of an attention module."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, prefix_attention)
    site.owner = (module,)
    module.add_module(CHILD, site)
    swap_in(module, PrefixAttention)


def fill_attentions(model: nn.Module, config: PrefixConfig) -> None:
    """Write the attention modules that ``attention`` and ``layers`` mean for this model into a config that leaves them open.

    Raises:
        ValueError: No attention of the model asks transformers for its function, or none is chosen.
    """
    modules = dict(base_modules(model))
    if config.target_modules is not None:
        return
    found = {name: module for name, module in modules.items() if dispatches(module)}
    if not found:
        raise ValueError(_refusal(modules))
    one_stack = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    chosen = [name for name in found if one_stack or _stack(name, found[name]) in config.attention]
    if config.layers is not None:
        missing = set(config.layers) - {_index(name) for name in chosen}
        if missing:
            raise ValueError(
                f"layers={config.layers}: there is no attention in layer {min(missing)}; they are in layers "
                f"{sorted({_index(name) for name in chosen})}"
            )
        chosen = [name for name in chosen if _index(name) in config.layers]
    config.target_modules = chosen


def require_dispatch(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise where a module that was named cannot take a prefix.

    Raises:
        ValueError: Its forward does not ask transformers for its attention function.
    """
    if not dispatches(module):
        raise ValueError(f"{name}: {_refusal(dict(base_modules(model)), module)}")


def _refusal(modules: dict[str, nn.Module], module: nn.Module | None = None) -> str:
    kinds = [type(m).__name__ for m in modules.values() if "Attention" in type(m).__name__]
    kind = type(module).__name__ if module is not None else kinds[-1] if kinds else None
    why = (
        f"its {kind} computes the attention itself instead of asking transformers' AttentionInterface"
        if kind
        else "it has no attention"
    )
    return f"{type(modules['']).__name__} cannot take a KV prefix: {why}; use BottleneckConfig or LoraConfig on this architecture"


def _stack(name: str, module: nn.Module) -> str:
    if is_cross_attention(name, module):
        return "cross"
    return "encoder" if "encoder" in name.split(".") else "decoder"


def _index(name: str) -> int:
    """Number of the layer: the first one in the name (T5 numbers a layer's parts as well)."""
    return int(next((part for part in name.split(".") if part.isdigit()), -1))


def build(module: Any, model: nn.Module, config: PrefixConfig) -> Prefix:
    """Make the prefix that a config means for one attention module.

    Raises:
        ValueError: The module does not ask for its attention function, or does not tell the sizes of its heads.
    """
    kv_heads, heads, key_size, value_size = head_sizes(module)
    device, dtype = device_and_dtype(module, model)
    gated = heads if config.gate else None
    prefix = Prefix(
        kv_heads,
        config.num_virtual_tokens,
        key_size,
        value_size,
        config.init_std,
        gated,
        device,
        dtype,
    )
    prefix.position_offset = config.position_offset
    return prefix


def head_sizes(module: Any) -> tuple[int, int, int, int]:
    """Heads of keys and of queries, features of a key and of a value.

    Raises:
        ValueError: The module does not tell.
    """
    config = module.__dict__.get("config")
    sizes = [getattr(module, name, None) for name in ("qk_head_dim", *_HEAD_SIZE_NAMES)]
    size = next((size for size in sizes if isinstance(size, int)), None)
    heads = getattr(config, "num_attention_heads", None)
    if size is None or not isinstance(heads, int):
        raise ValueError(
            f"{type(module).__name__} does not tell the size of its heads ({', '.join(_HEAD_SIZE_NAMES)}); leave it out by "
            "exclude_modules"
        )
    if isinstance(getattr(module, "v_head_dim", None), int):  # DeepSeek's latent attention
        return heads, heads, size, module.v_head_dim
    own_heads = next(
        (n for a in ("num_heads", "n_heads") if isinstance(n := getattr(module, a, None), int)),
        heads,
    )
    for name in _KEY_NAMES:
        projection = getattr(module, name, None)
        if projection is not None:
            projection = getattr(projection, "base_layer", projection)
            return projection.out_features // size, own_heads, size, size
    return getattr(config, "num_key_value_heads", None) or own_heads, own_heads, size, size


def fill_from_tokens(model: Any, prefixes: Mapping[str, Prefix], token_ids: Iterable[int]) -> None:
    """Set prefixes to the keys and values that the model computes for a text, prefixes of all adapters aside.

    Args:
        model: A model whose forward takes ``input_ids``.
        prefixes: By the names of their attention modules.
        token_ids: Repeated or cut to the length of the prefixes.

    Raises:
        ValueError: The model takes no tokens, or an attention was not called.
    """
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"init='text': {type(model).__name__} takes no tokens; use init='random'")
    count = max(prefix.key.shape[1] for prefix in prefixes.values())
    token_ids = list(token_ids)
    ids = torch.tensor(token_ids * -(-count // len(token_ids)))[None, :count]
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "use_cache": False}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    if "use_cache" not in parameters:
        del inputs["use_cache"]
    attentions = [
        module for _, module in base_modules(model) if isinstance(module, PrefixAttention)
    ]
    try:
        for module in attentions:
            module.__dict__[RECORD] = []
        with evaluating(model), torch.no_grad():
            model(**inputs)
        modules = dict(base_modules(model))
        for name, prefix in prefixes.items():
            recorded = modules[name].__dict__[RECORD]
            if not recorded:
                raise ValueError(f"init='text': {name} was not called; use init='random'")
            for parameter, tensor in zip((prefix.key, prefix.value), recorded[-1], strict=True):
                parameter.data.copy_(tensor[0, :, : parameter.shape[1]])
    finally:
        for module in attentions:
            module.__dict__.pop(RECORD, None)
