"""Strategies that put an adapter on a frozen model: peftkit's methods, their mixes, and PEFT's other methods."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftkit.errors import ContractError, short
from peftkit.finetune.recipe import SET_BY_PEFTKIT, changed
from peftkit.finetune.schema import build, unknown_key
from peftkit.finetune.strategies.base import ADAPTER_LR, HEAD_LR, AdapterSetting, Prepared, Strategy

_OURS = ("lora", "bottleneck", "prefix")
_LORA = {"r": 16, "lora_alpha": 32}


class Adapter(Strategy):
    """Train an adapter of one method."""

    is_adapter = True
    lr = ADAPTER_LR
    head_lr = HEAD_LR

    @classmethod
    def options(cls, values: Any, where: str) -> Any:
        return _config(cls.name, values, where)

    @classmethod
    def apply(cls, model: nn.Module, options: Any, setting: AdapterSetting) -> Prepared:
        return _wrapped(model, [options], setting)


class Lora(Adapter):
    """LoRA, with every field of PEFT's ``LoraConfig``: ``use_dora``, ``use_rslora``, ``init_lora_weights``, ...

    The rate is ten times that of full tuning (Schulman and others, "LoRA without regret", 2025).
    """

    name = "lora"
    summary = "LoRA and DoRA, with every field of PEFT's LoraConfig (r, lora_alpha, target_modules, use_dora, ...)"


class BottleneckAdapter(Adapter):
    """Bottleneck adapters."""

    name = "bottleneck"
    summary = "bottleneck adapters, with the fields of BottleneckConfig (reduction_factor, placement, ...)"


class Prefix(Adapter):
    """KV prefixes."""

    name = "prefix"
    summary = "a KV prefix, with the fields of PrefixConfig (num_virtual_tokens, gate, ...)"
    lr = 5 * ADAPTER_LR


@dataclasses.dataclass
class MixOptions:
    """Two or three methods as one adapter."""

    lora: Any = None
    bottleneck: Any = None
    prefix: Any = None


class Mix(Strategy):
    """Two or three of LoRA, bottleneck adapters and a prefix, as one adapter."""

    name = "mix"
    summary = "two or three of lora, bottleneck and prefix as one adapter: {name: mix, lora: {r: 8}, bottleneck: {}}"
    Options = MixOptions
    is_adapter = True
    lr = ADAPTER_LR
    head_lr = HEAD_LR

    @classmethod
    def options(cls, values: Any, where: str) -> MixOptions:
        if not isinstance(values, Mapping):
            raise ContractError(f"{where}={short(values)} must have the keys {', '.join(_OURS)}")
        for name in values:
            if name not in _OURS:
                raise ContractError(
                    unknown_key(f"{where}.{name}", values[name], _OURS, f"{where}.")
                )
        configs = {
            name: _config(name, values[name] or {}, f"{where}.{name}")
            for name in values
            if values[name] is not False
        }
        if len(configs) < 2:
            raise ContractError(
                f"strategy mix has {', '.join(configs) or 'no method'}; give two or three of {', '.join(_OURS)}, such as "
                "{name: mix, lora: {r: 8}, bottleneck: {reduction_factor: 16}}"
            )
        return MixOptions(**configs)

    @classmethod
    def apply(cls, model: nn.Module, options: MixOptions, setting: AdapterSetting) -> Prepared:
        configs = [getattr(options, name) for name in _OURS]
        return _wrapped(model, [config for config in configs if config is not None], setting)


def other_method(name: str) -> type[Adapter] | None:
    """A strategy for another method of PEFT, such as ``ia3``, or ``None`` if PEFT has none of that name."""
    if name.lower() != name or name.upper() not in _peft_methods():
        return None
    fields = {"name": name, "summary": f"PEFT's {name.upper()}", "lr": ADAPTER_LR}
    return type(name, (Adapter,), fields)


def other_names() -> list[str]:
    """The names of PEFT's other methods."""
    return sorted(name.lower() for name in _peft_methods())


def _peft_methods() -> dict[str, Any]:
    """PEFT's methods that are layers of the model: not prompts, and not peftkit's own or LoRA."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {
        str(kind.value): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(config, PromptLearningConfig)
        and str(kind.value) not in ("LORA", "ADALORA", "XLORA")
        and not str(kind.value).startswith("PEFTKIT")
    }


def _config_class(name: str) -> Any:
    if name == "lora":
        from peft import LoraConfig

        return LoraConfig
    if name in _OURS:
        from peftkit.bridge import BottleneckConfig, PrefixConfig

        return {"bottleneck": BottleneckConfig, "prefix": PrefixConfig}[name]
    return _peft_methods()[name.upper()]


def _config(name: str, values: Any, where: str) -> Any:
    """Build the config of a method, and turn every refusal into an error that names the key."""
    cls = _config_class(name)
    if isinstance(values, Mapping):
        for field in SET_BY_PEFTKIT:
            if field in values:
                raise ContractError(
                    f"{where}.{field}={short(values[field])} is set by peftkit; remove it from the recipe"
                )
    from peftkit.find.values import check_values

    defaults = _LORA if name == "lora" and isinstance(values, Mapping) else {}
    try:
        config = build(cls, {**defaults, **values} if defaults else values, where)
        check_values(config)
    except ContractError:
        raise
    except (TypeError, ValueError) as error:
        raise ContractError(f"{where}: {' '.join(str(error).split())}") from error
    return config


def _wrapped(model: nn.Module, configs: list[Any], setting: AdapterSetting) -> Prepared:
    from peftkit.wrapping import wrap

    # PEFT writes what it has resolved into the config, which is part of the recipe.
    configs = [copy.deepcopy(config) for config in configs]
    for config in configs:
        if config.task_type is None:
            config.task_type = setting.task_type
        excluded = getattr(config, "exclude_modules", None)
        if setting.outside_loss and not isinstance(excluded, str):
            config.exclude_modules = [*(excluded or ()), *setting.outside_loss]
        if setting.outside_loss and getattr(config, "modules_to_save", ()) is None:
            # They need not be trained even if they were not in the checkpoint.
            config.modules_to_save = []
    try:
        return Prepared(wrap(model, *configs))
    except ContractError:
        raise
    except (TypeError, ValueError) as error:
        names = [
            f"{config.peft_type.lower().removeprefix('peftkit_')} {changed(config) or ''}".strip()
            for config in configs
        ]
        reason = " ".join(str(error).split())
        way_out = "; name them in strategy.target_modules" if "target_modules" in reason else ""
        raise ContractError(
            f"strategy {' and '.join(names)} does not fit {type(model).__name__}: {reason}{way_out}"
        ) from error
