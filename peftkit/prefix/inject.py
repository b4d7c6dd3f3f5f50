"""Add KV prefixes to a model's attentions and remove them.

A prefix is a child of the attention module, whose class is exchanged for a subclass. No module is replaced, and no key of the
state dict changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftkit.attention_dispatch import depends_on_name, dispatches
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
        config: The configuration of the prefixes.

    Returns:
        Names of the attention modules that got a prefix.

    Raises:
        ValueError: The model's attention does not use transformers' ``AttentionInterface``, a module in ``target_modules`` does
            not exist, or a module already has a prefix.
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
            raise ValueError(f"{name} already has a prefix; call remove_prefixes first")
        site = PrefixSite()
        site.adapters["default"] = new[name] = build(modules[name], model, config)
        attach(modules[name], site)
        if config.position_offset:
            move_positions(model, site)
    if config.init == "text":
        fill_from_tokens(model, new, config.init_token_ids or [])
    return list(new)


def remove_prefixes(model: nn.Module) -> dict[str, PrefixSite]:
    """Remove all prefixes from a model, and return them by the names of their attention modules."""
    removed = {}
    for name, module in list(base_modules(model)):
        if isinstance(module, PrefixAttention):
            removed[name] = module._modules.pop(CHILD)
            swap_out(module, PrefixAttention)
    restore_positions(model)
    return removed


def attach(module: nn.Module, site: PrefixSite) -> None:
    """Add ``site``, the prefixes of one attention, to the attention module."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, prefix_attention)
    site.owner = (module,)
    module.add_module(CHILD, site)
    swap_in(module, PrefixAttention)


def fill_attentions(model: nn.Module, config: PrefixConfig) -> None:
    """Set ``config.target_modules`` to the attentions that ``attention`` and ``layers`` select, unless it is set.

    Raises:
        ValueError: No attention of the model uses transformers' ``AttentionInterface``, or a layer has no attention.
    """
    modules = dict(base_modules(model))
    if config.target_modules is not None:
        return
    found = {name: module for name, module in modules.items() if _can_have_prefix(module)}
    if not found:
        raise ValueError(_refusal(modules))
    one_stack = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    chosen = [name for name in found if one_stack or _stack(name, found[name]) in config.attention]
    if config.layers is not None:
        missing = set(config.layers) - {_index(name) for name in chosen}
        if missing:
            raise ValueError(
                f"layers={config.layers}: layer {min(missing)} has no attention; the layers with attentions are "
                f"{sorted({_index(name) for name in chosen})}"
            )
        chosen = [name for name in chosen if _index(name) in config.layers]
    config.target_modules = chosen


def require_dispatch(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise if a module cannot have a prefix.

    Raises:
        ValueError: The module's forward does not use transformers' ``AttentionInterface``, or depends on the name in it.
    """
    if not _can_have_prefix(module):
        raise ValueError(f"{name}: {_refusal(dict(base_modules(model)), module)}")


def _can_have_prefix(module: nn.Module) -> bool:
    return dispatches(module) and not depends_on_name(module)


def _refusal(modules: dict[str, nn.Module], module: nn.Module | None = None) -> str:
    kinds = [type(m).__name__ for m in modules.values() if "Attention" in type(m).__name__]
    kind = type(module).__name__ if module is not None else kinds[-1] if kinds else None
    why = (
        f"its {kind} computes the attention itself instead of using transformers' AttentionInterface"
        if kind
        else "it has no attention"
    )
    sparse = [type(m).__name__ for m in modules.values() if dispatches(m) and depends_on_name(m)]
    if sparse and (module is None or kind in sparse):
        why = f"its {sparse[0]} computes something else for other attention functions than those of transformers"
    return (
        f"{type(modules['']).__name__} cannot have a KV prefix: {why}; use BottleneckConfig or LoraConfig on this "
        "architecture"
    )


def _stack(name: str, module: nn.Module) -> str:
    if is_cross_attention(name, module):
        return "cross"
    return "encoder" if "encoder" in name.split(".") else "decoder"


def _index(name: str) -> int:
    """Return the index of the layer: the first number in the name. T5 also numbers the parts of a layer."""
    return int(next((part for part in name.split(".") if part.isdigit()), -1))


def build(module: Any, model: nn.Module, config: PrefixConfig) -> Prefix:
    """Make the prefix of one attention module.

    Raises:
        ValueError: The sizes of the module's heads are unknown.
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
    """Return the number of key heads, the number of query heads, the features of a key, and the features of a value.

    Raises:
        ValueError: The module has none of the attributes with these sizes.
    """
    sizes = [getattr(module, name, None) for name in ("qk_head_dim", *_HEAD_SIZE_NAMES)]
    size = next((size for size in sizes if isinstance(size, int)), None)
    heads = _setting(module, "num_attention_heads")
    if size is None or not isinstance(heads, int):
        raise ValueError(
            f"the head size of {type(module).__name__} is unknown, because it has no attribute {', '.join(_HEAD_SIZE_NAMES)}, "
            "or its config has no num_attention_heads; list the module in exclude_modules"
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
    return _setting(module, "num_key_value_heads") or own_heads, own_heads, size, size


def _setting(module: Any, name: str) -> Any:
    """A value of the config of an attention module, or ``None``. In some models it differs between the layers."""
    config = module.__dict__.get("config")
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return getattr(config.per_layer_config[module.layer_idx], name, None)  # pyright: ignore[reportOptionalMemberAccess]


def fill_from_tokens(model: Any, prefixes: Mapping[str, Prefix], token_ids: Iterable[int]) -> None:
    """Set prefixes to the keys and values that the model computes for a text without any prefix.

    Args:
        model: A model whose forward has the argument ``input_ids``.
        prefixes: The prefixes by the names of their attention modules.
        token_ids: The text. It is repeated or truncated to the length of the prefixes.

    Raises:
        ValueError: The model's input is not tokens, or an attention was not called.
    """
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(
            f"init='text': the input of {type(model).__name__} is not tokens; use init='random'"
        )
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
                raise ValueError(
                    f"init='text': the model's forward did not call {name}; use init='random'"
                )
            for parameter, tensor in zip((prefix.key, prefix.value), recorded[-1], strict=True):
                parameter.data.copy_(tensor[0, :, : parameter.shape[1]])
    finally:
        for module in attentions:
            module.__dict__.pop(RECORD, None)
