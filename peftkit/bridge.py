"""Prefixes, bottlenecks and their mix with LoRA as tuner types of PEFT. Only this file depends on PEFT's tuner classes.

Importing this module registers three new types in PEFT's tables and replaces none of PEFT's types. ``peftkit.wrap``,
``peftkit.load_adapter`` and the configs import it. A program that loads such an adapter with plain PEFT needs the line
``import peftkit.bridge`` first.
"""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, LoraModel, PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peftkit.bottleneck import BottleneckConfig, BottleneckSite, remove_bottlenecks
from peftkit.bottleneck import inject as bottleneck
from peftkit.find.matching import check_targets
from peftkit.find.modules import wrapped_modules
from peftkit.find.prepare import check_arguments, complete, fill_heads, task_of
from peftkit.find.targets import fill_targets
from peftkit.find.values import check_tokens, check_values
from peftkit.peft_types import PeftkitType
from peftkit.prefix import PrefixConfig, PrefixSite, remove_prefixes
from peftkit.prefix import inject as prefix
from peftkit.prefix.positions import move_positions

__all__ = ["BottleneckConfig", "MixConfig", "PrefixConfig", "combine"]

_NO_MERGE = (
    "{} cannot be merged: it is not linear in the layer's input, so no weight has the same output; keep the adapter, or train "
    "only LoRA"
)


@dataclass
class MixConfig(LoraConfig):
    """LoRA together with a prefix, a bottleneck or both, as one adapter. ``wrap`` makes it from their configs."""

    prefix_config: dict[str, Any] | None = None
    """Fields of a ``PrefixConfig``."""

    bottleneck_config: dict[str, Any] | None = None
    """Fields of a ``BottleneckConfig``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftkitType.PEFTKIT_MIX  # pyright: ignore[reportAttributeAccessIssue]


def prepare(model: nn.Module, configs: tuple[Any, ...], adapter_name: str) -> PeftConfig:
    """Check the arguments of ``wrap``, and return one complete config. The model and the configs are not changed.

    Raises:
        TypeError: An argument or a value in a config has the wrong type.
        ValueError: A value is out of range, the configs do not fit together, or a config does not fit the model.
        ContractError: An entry of a config matches nothing, or PEFT cannot train a head that has to be trained.
    """
    check_arguments(model, configs, adapter_name)
    if len(configs) > 1:
        return complete(model, combine(model, configs))
    if configs:
        return complete(model, copy.deepcopy(configs[0]))
    return complete(model, LoraConfig(r=16, lora_alpha=32, task_type=task_of(model)))


def combine(model: nn.Module, configs: tuple[Any, ...]) -> PeftConfig:
    """Combine several configs into one, and find the target modules of each. The model and the configs are not changed.

    Raises:
        ValueError: Two configs have the same type, a type cannot be mixed, or the tasks differ.
    """
    kinds = {LoraConfig: None, PrefixConfig: None, BottleneckConfig: None}
    for config in configs:
        if type(config) not in kinds:
            raise ValueError(
                f"{type(config).__name__} cannot be mixed with other methods; only LoraConfig, PrefixConfig and "
                "BottleneckConfig can be mixed"
            )
        if kinds[type(config)] is not None:
            raise ValueError(
                f"wrap got two {type(config).__name__}s; give one, and add the second adapter with model.add_adapter"
            )
        check_values(config)
        if type(config) is not LoraConfig:
            check_tokens(model, config)
            check_targets(model, config)
        kinds[type(config)] = copy.deepcopy(config)
    tasks = {str(config.task_type): config.task_type for config in configs if config.task_type}
    if len(tasks) > 1:
        raise ValueError(
            f"the configs name different tasks ({', '.join(sorted(tasks))}); give all of them the same task_type"
        )
    lora, prefix_config, bottleneck_config = kinds.values()
    mix: Any = LoraConfig(target_modules=DUMMY_TARGET_MODULES) if lora is None else lora
    mix.task_type = next(iter(tasks.values()), None)
    saved = [config.modules_to_save for config in configs if config.modules_to_save is not None]
    mix.modules_to_save = (
        list(dict.fromkeys(n for names in saved for n in names)) if saved else None
    )
    fill_heads(model, mix)
    if lora is not None:
        fill_targets(model, lora)
    mix.__class__ = MixConfig
    mix.peft_type = PeftkitType.PEFTKIT_MIX
    mix.prefix_config = mix.bottleneck_config = None
    if prefix_config is not None:
        prefix.fill_attentions(model, prefix_config)
        mix.prefix_config = _own_fields(prefix_config)
    if bottleneck_config is not None:
        bottleneck.fill_points(model, bottleneck_config)
        mix.bottleneck_config = _own_fields(bottleneck_config)
    return mix


def _own_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the fields that ``PeftConfig`` does not have."""
    shared = {field.name for field in fields(PeftConfig)} | {"modules_to_save"}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in shared}


class _OwnLayer(BaseTunerLayer):
    """The interface that PEFT needs from a tuner layer. The layer is a child of the adapted module, so it has no base layer."""

    adapter_layer_names = ("adapters",)
    weight: Any = None
    bias: Any = None
    peftkit_method: str

    def chosen(self: Any) -> list[nn.Module]:
        """Return the active adapters; none while adapters are disabled."""
        if self._disable_adapters:
            return []
        return [self.adapters[name] for name in self.active_adapters if name in self.adapters]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise an error, because these adapters cannot be merged.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_NO_MERGE.format(f"a {self.peftkit_method}"))

    def unmerge(self) -> None:
        """Do nothing, because these adapters are never merged."""


class BottleneckLayer(_OwnLayer, BottleneckSite):
    """The bottleneck adapters of one module, by name."""

    peftkit_method = "bottleneck"


class PrefixLayer(_OwnLayer, PrefixSite):
    """The prefixes of one attention, by name."""

    peftkit_method = "prefix"


def _place_bottleneck(model: nn.Module, config: BottleneckConfig, adapter: str, name: str) -> None:
    modules = {name: outer for name, outer, _ in wrapped_modules(model)}
    module = modules[name]
    site = module._modules.get(bottleneck.CHILD)
    options = bottleneck.site_options(module, name, config)
    if site is None:
        site = BottleneckLayer(**options)
        bottleneck.attach(modules, name, site)
    elif (site.normed, site.source) != (options["normed"], options["source"]):
        raise ValueError(
            f"{name} already has a bottleneck with another placement (normed={site.normed}, source={site.source!r}); use the "
            "same placement for all adapters of this model"
        )
    site.adapters[adapter] = bottleneck.build(module, model, config)


def _place_prefix(model: nn.Module, config: PrefixConfig, adapter: str, module: nn.Module) -> None:
    site = module._modules.get(prefix.CHILD)
    new = prefix.build(module, model, config)
    if site is None:
        site = PrefixLayer()
        prefix.attach(module, site)
    site.adapters[adapter] = new
    if config.position_offset:
        move_positions(model, site)


def _write_text(model: nn.Module, config: PrefixConfig, adapter: str) -> None:
    """Initialise the new prefixes from the config's text, unless a checkpoint will be loaded into them."""
    modules: dict[str, Any] = {name: inner for name, _, inner in wrapped_modules(model)}
    sites: dict[str, Any] = {
        name: inner.virtual_tokens.adapters[adapter]
        for name, inner in modules.items()
        if adapter in getattr(inner._modules.get(prefix.CHILD), "adapters", {})
    }
    meta = any(p.is_meta for site in sites.values() for p in site.parameters())
    if config.init == "text" and not config.inference_mode and not meta:
        prefix.fill_from_tokens(model, sites, config.init_token_ids or [])


class _OwnTuner(BaseTuner):
    """Base of the three tuners: saved keys have no adapter name, and unloading does not merge."""

    tuner_layer_cls = BaseTunerLayer  # a mix has layers of several classes
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - typed by PEFT

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        ours = rf"(\.(?:{bottleneck.CHILD}|{prefix.CHILD})\.adapters)\.{re.escape(adapter_name)}\."
        short, found = re.subn(ours, r"\1.", key)
        return short if found else super()._remove_adapter_name_from_key(key, adapter_name)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            _NO_MERGE.format("an adapter with a prefix or a bottleneck")
            + "; unload() returns the base model"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        remove_bottlenecks(self.model)
        remove_prefixes(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


class BottleneckTuner(_OwnTuner):
    """Bottleneck adapters for ``peft.get_peft_model``."""

    prefix = f"{bottleneck.CHILD}."

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        bottleneck.fill_points(self.model, peft_config)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        _place_bottleneck(self.model, peft_config, adapter_name, current_key)


class PrefixTuner(_OwnTuner):
    """KV prefixes for ``peft.get_peft_model``."""

    prefix = f"{prefix.CHILD}."

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        prefix.fill_attentions(self.model, peft_config)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        prefix.require_dispatch(self.model, current_key, target)
        _place_prefix(self.model, peft_config, adapter_name, target)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Run PEFT's injection, then initialise the prefixes from the config's text."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _write_text(self.model, self.peft_config[adapter_name], adapter_name)


class MixTuner(_OwnTuner, LoraModel):
    """LoRA, injected by PEFT, together with prefixes and bottlenecks."""

    target_module_mapping = LoraModel.target_module_mapping

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        """Run PEFT's injection of LoRA, then add the prefixes and bottlenecks.

        Bottlenecks of earlier adapters are removed first and added again to the new LoRA layers.
        """
        config: Any = self.peft_config[adapter_name]
        earlier = remove_bottlenecks(self.model)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        modules = {name: outer for name, outer, _ in wrapped_modules(self.model)}
        for name, site in earlier.items():
            bottleneck.attach(modules, name, site)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            if config.bottleneck_config is not None:
                bottlenecks = BottleneckConfig(**config.bottleneck_config)
                bottleneck.fill_points(self.model, bottlenecks)
                for name in _named(bottlenecks, modules):
                    _place_bottleneck(self.model, bottlenecks, adapter_name, name)
            prefixes = None
            if config.prefix_config is not None:
                prefixes = PrefixConfig(
                    **config.prefix_config, inference_mode=config.inference_mode
                )
                prefix.fill_attentions(self.model, prefixes)
                for name in _named(prefixes, modules):
                    prefix.require_dispatch(self.model, name, modules[name])
                    _place_prefix(self.model, prefixes, adapter_name, modules[name])
        for module in self.model.modules():
            if isinstance(module, _OwnLayer):
                module.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if prefixes is not None:
            _write_text(self.model, prefixes, adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error, because PEFT can only combine LoRA adapters.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "adapters with a prefix or a bottleneck cannot be averaged, because they are not linear; train one adapter"
        )


def _named(config: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the modules that a config selects, by PEFT's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name in modules if name and check_target_module_exists(config, name)]


for _type, _config, _tuner in (
    (PeftkitType.PEFTKIT_BOTTLENECK, BottleneckConfig, BottleneckTuner),
    (PeftkitType.PEFTKIT_PREFIX, PrefixConfig, PrefixTuner),
    (PeftkitType.PEFTKIT_MIX, MixConfig, MixTuner),
):
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = _tuner.prefix  # pyright: ignore[reportArgumentType]
