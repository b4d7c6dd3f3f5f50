"""Add bottleneck adapters to a model and remove them.

An adapter is a child of the adapted module, and a forward hook runs it. No module is replaced, and no key of the state dict
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.bottleneck.config import DEFAULT_REDUCTION, BottleneckConfig
from peftkit.bottleneck.module import Bottleneck, BottleneckSite
from peftkit.find.modules import is_linear_like, wrapped_modules
from peftkit.find.points import Point, find_points, first_tensor
from peftkit.injection import device_and_dtype, refuse_peft_fields

CHILD = "bottleneck"
_FEEDS = "peftkit_feeds"
_KIND = {"houlsby": ("attention", "mlp"), "pfeiffer": ("end",), "parallel": ("mlp",)}
_WIDTH_NAMES = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


def add_bottlenecks(
    model: nn.Module, config: BottleneckConfig, example: Mapping[str, Any] | None = None
) -> list[str]:
    """Freeze a model and add bottleneck adapters to it, without PEFT.

    Args:
        model: A transformers model; changed in place.
        config: The configuration of the adapters.
        example: Inputs of one forward, which finds the target modules. Default: inputs made from the model's config.

    Returns:
        Names of the modules whose outputs are adapted.

    Raises:
        ValueError: The target modules cannot be found, a module in ``target_modules`` does not exist, or a module already has
            adapters.
    """
    refuse_peft_fields(config)
    model.requires_grad_(False)
    fill_points(model, config, example)
    modules = {name: outer for name, outer, _ in wrapped_modules(model)}
    for name in config.target_modules or ():
        if name not in modules:
            raise ValueError(f"target_modules: {name!r} is not a module of {type(model).__name__}")
        if hasattr(modules[name], CHILD):
            raise ValueError(
                f"{name} already has bottleneck adapters; call remove_bottlenecks first"
            )
        site = BottleneckSite(**site_options(modules[name], name, config))
        site.adapters["default"] = build(modules[name], model, config)
        attach(modules, name, site)
    return list(config.target_modules or ())


def remove_bottlenecks(model: nn.Module) -> dict[str, BottleneckSite]:
    """Remove all bottleneck adapters from a model, and return them by the names of their modules."""
    removed = {}
    for name, outer, _ in list(wrapped_modules(model)):
        if isinstance(outer._modules.get(CHILD), BottleneckSite):
            removed[name] = outer._modules.pop(CHILD)
            _drop_hook(outer._forward_hooks, outer._forward_hooks_with_kwargs, _adapt)
        if outer.__dict__.pop(_FEEDS, None) is not None:
            _drop_hook(outer._forward_pre_hooks, outer._forward_pre_hooks_with_kwargs, _feed)
    return removed


def fill_points(
    model: nn.Module, config: BottleneckConfig, example: Mapping[str, Any] | None = None
) -> None:
    """Set ``config.target_modules`` to the modules that ``placement`` and ``layers`` select, unless it is set.

    Raises:
        ValueError: The modules cannot be found, or ``layers`` has a layer that the model does not have.
    """
    if config.target_modules is not None:
        return
    points = [p for p in find_points(model, example) if p.kind in _KIND[config.placement]]
    if config.layers is not None:
        missing = set(config.layers) - {point.index for point in points}
        if missing:
            raise ValueError(
                f"layers={config.layers}: the model has no layer {min(missing)}; it has the layers 0 to "
                f"{max(point.index for point in points)}"
            )
        points = [point for point in points if point.index in config.layers]
    _check_widths(model, points)
    config.target_modules = list(dict.fromkeys(point.output for point in points))
    if config.placement == "parallel":
        config.sources = {p.output: p.source for p in points if p.source != p.output} or None


def site_options(module: nn.Module, name: str, config: BottleneckConfig) -> dict[str, Any]:
    """Return the arguments of ``BottleneckSite`` for this module."""
    normed = config.placement == "pfeiffer" and "Norm" in type(module).__name__
    return {"normed": normed, "source": (config.sources or {}).get(name)}


def build(module: nn.Module, model: nn.Module, config: BottleneckConfig) -> Bottleneck:
    """Make the adapter of one module."""
    width = output_width(module, model)
    size = config.bottleneck_size
    if size is None:
        size = max(1, int(width / (config.reduction_factor or DEFAULT_REDUCTION)))
    device, dtype = device_and_dtype(module, model)
    return Bottleneck(
        width,
        size,
        config.activation,
        config.scaling,
        config.layer_norm,
        config.placement == "parallel",
        device,
        dtype,
    )


def attach(modules: Mapping[str, nn.Module], name: str, site: BottleneckSite) -> None:
    """Make ``site`` a child of a module, and register the hooks.

    Args:
        modules: The modules by their names in the base model, from ``wrapped_modules``. For an adapted layer this is the outer
            module, whose forward is called.
        name: A key of ``modules``.
        site: The adapters of the module.
    """
    module = modules[name]
    module.add_module(CHILD, site)
    module.register_forward_hook(_adapt, with_kwargs=True)
    if site.source is not None:
        source = modules[site.source]
        source.__dict__[_FEEDS] = site.carry
        source.register_forward_pre_hook(_feed, with_kwargs=True)


def output_width(module: nn.Module, model: nn.Module) -> int:
    """Return the size of the last axis of a module's output.

    Linear layers and norms have this size in their weights. For other modules it is read from the module's or the model's
    config.

    Raises:
        ValueError: The size is unknown.
    """
    inner: Any = getattr(module, "base_layer", module)
    if is_linear_like(inner):
        return inner.nf if hasattr(inner, "nf") else inner.out_features
    if "Norm" in type(inner).__name__ and inner._parameters.get("weight") is not None:
        return inner.weight.shape[-1]
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (getattr(inner, "config", None), inner, text):
        for name in _WIDTH_NAMES:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(
        f"the output size of {type(inner).__name__} is unknown; name a linear layer in target_modules instead"
    )


def _check_widths(model: nn.Module, points: list[Point]) -> None:
    modules = {name: outer for name, outer, _ in wrapped_modules(model)}
    for point in points:
        width = output_width(modules[point.output], model)
        if width != point.width:
            raise ValueError(
                f"the output of {point.output} has {point.width} features, but the config of its model says {width}; name a "
                "linear layer in target_modules instead"
            )


def _adapt(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook of an adapted module: apply the adapters to the output, or to its first tensor."""
    site = module.bottleneck
    x = first_tensor((*args, *kwargs.values())) if site.carry is None else site.carry.take()
    if not site.chosen():
        return output
    if site.normed:
        return module.forward(site(args[0], output, x))
    if isinstance(output, Tensor):
        return site(output, None, x)
    first = next(i for i, item in enumerate(output) if isinstance(item, torch.Tensor))
    adapted = site(output[first], None, x)
    return (*output[:first], adapted, *output[first + 1 :])


def _feed(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of the module whose input parallel adapters read: record the input."""
    module.__dict__[_FEEDS].value = first_tensor((*args, *kwargs.values()))


def _drop_hook(hooks: dict[int, Any], with_kwargs: dict[int, bool], hook: Any) -> None:
    for key in [key for key, registered in hooks.items() if registered is hook]:
        del hooks[key]
        with_kwargs.pop(key, None)
