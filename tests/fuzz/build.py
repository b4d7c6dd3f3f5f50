"""The base model, its adapters and their values, as a case describes them; a case gives the same bits each time."""

import copy
import functools
import hashlib
import json
import random
import re
from contextlib import suppress
from typing import Any

import torch
from fuzz import plain
from peft import LoraConfig
from torch import Tensor, nn

from peftkit.compatibility import tiny

Case = dict[str, Any]
"""Options by name; an option that is left out has its simplest value. Every value can be written as JSON."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_LAYERS += ("decoder_layers", "num_decoder_layers")


class Unbuildable(Exception):
    """No model of this kind with these settings exists, so the case says nothing."""


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of the base's weights."""
    return DTYPES[case.get("dtype", "float64")]


def chooser(case: Case, purpose: str) -> random.Random:
    """A source of choices for one purpose, so that leaving out one option does not change another's."""
    return random.Random(f"{case['seed']} {purpose}")


def base_model(case: Case) -> nn.Module:
    """The model without adapters, in the case's dtype and in evaluation mode.

    Raises:
        Unbuildable: transformers refuses these settings.
    """
    names = ("family", "seed", "layers", "formula", "attention", "values", "dtype")
    settings = {k: v for k, v in case.items() if k in names or k.startswith("config.")}
    return copy.deepcopy(_base_model(json.dumps(settings, sort_keys=True)))


@functools.lru_cache(maxsize=2)
def _base_model(settings: str) -> nn.Module:
    case: Case = json.loads(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case["family"] in plain.FAMILIES:
            model = plain.build(case["family"], case.get("formula"))
        else:
            model = _transformer(case)
        _fill(model, case)
    return model.to(dtype_of(case)).eval()


def _transformer(case: Case) -> nn.Module:
    try:
        config = tiny._config(case["family"])
        tiny.shrink(config)
        _keep_layers(config, case.get("layers", 1))
        for name, value in case.items():
            if name.startswith("config."):
                _set(config, name.removeprefix("config."), value)
        for name in ("mamba_chunk_size", "chunk_size"):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, 8)  # padding to 256 positions takes seconds
        if getattr(config, "is_encoder_decoder", False):
            config.decoder_start_token_id = 1
        model = tiny._class(config)(config)
    except Exception as error:  # whatever transformers makes of settings that do not fit
        raise Unbuildable(f"{type(error).__name__}: {error}") from error
    for kind, method in (
        (case.get("attention", "sdpa"), "set_attn_implementation"),
        ("eager", "set_experts_implementation"),  # the grouped product has no float64
    ):
        # some models have one implementation only
        with suppress(ValueError, AttributeError, ImportError):
            getattr(model, method)(kind)
    model.config.use_cache = False  # the caches of some hybrids need more layers
    return model


def _keep_layers(config: Any, count: int) -> None:
    """Leave ``count`` layers, and as many entries of each list that has one a layer."""
    before = vars(config).get("num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(set(kinds)) > count:
        return
    for name, value in list(vars(config).items()):
        if name in _LAYERS and isinstance(value, int):
            setattr(config, name, min(value, count))
        elif (
            isinstance(value, list) and len(value) == before > count and type(value[0]) is not float
        ):
            setattr(config, name, value[:count])


def _set(config: Any, name: str, value: Any) -> None:
    """Set an attribute on the config, or on those of its parts that have it."""
    parts = [v for v in vars(config).values() if hasattr(v, "model_type")]
    owners = [part for part in (config, *parts) if hasattr(part, name)]
    if not owners:
        raise ValueError(f"{type(config).__name__} has no {name}")
    for owner in owners:
        setattr(owner, name, value)


def _fill(model: nn.Module, case: Case) -> None:
    """Give every parameter values that separate formulas; initial values near 0, 0.02 and 1 would hide wrong ones."""
    generator = torch.Generator().manual_seed(case["seed"] % 2**31)
    corners = case.get("values", [])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise, alpha=0.1)
            is_norm = "norm" in name.lower() and p.dim() == 1 and name.endswith("weight")
            for corner, size in (("channels", 20.0), ("peaks", 300.0)):
                if is_norm and corner in corners:
                    p.copy_(noise)
                    p[3 % len(p)] = size
            if is_norm and "large" in corners:
                p.mul_(8.0)
            if p.dim() == 2 and any(part in name for part in ("emb", "wte", "shared")):
                _fill_embedding(p, corners)


def _fill_embedding(p: Tensor, corners: list[str]) -> None:
    if "mean" in corners:
        p.add_(0.5)
    if "small" in corners:
        p.mul_(1e-3)


def linears(model: nn.Module) -> list[str]:
    """Names of the modules that LoRA knows as linear."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def head_of(model: Any) -> str | None:
    """Name of the output head, or ``None``."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head))


def has_fresh_head(model: nn.Module) -> bool:
    """Whether the model is for a task whose head ``wrap`` trains in full, unlike PEFT, if the config does not name it."""
    return bool(
        re.search(r"Classification|QuestionAnswering|MultipleChoice|CTC", type(model).__name__)
    )


def adapter_config(case: Case, model: nn.Module, second: bool = False) -> LoraConfig:
    """The LoraConfig of a case for ``model``, its base without adapters.

    Args:
        case: The case.
        model: Its base.
        second: That of the second adapter, which reaches every other target with another rank.

    Raises:
        Unbuildable: The base has nothing that the case targets.
    """
    settings = {k.removeprefix("lora."): v for k, v in case.items() if k.startswith("lora.")}
    settings = {"r": 4, "lora_alpha": 6} | settings
    head, names = head_of(model), linears(model)
    inner = [name for name in names if name != head] or names
    kind = case.get("targets", "all")
    choose = chooser(case, "targets")
    if kind == "some":
        inner = sorted(choose.sample(inner, max(1, len(inner) // 2)))
    elif kind == "attention":
        inner = [name for name in inner if "att" in name] or inner
    elif kind == "one":
        inner = [choose.choice(inner)]
    elif kind == "head" and head in names:
        inner = [*inner[:2], head]
    elif kind == "embedding":
        inner += [n for n, m in model.named_modules() if type(m) is nn.Embedding][:1]
    if second:
        inner, settings["r"], settings["lora_alpha"] = inner[::2], 3, 5
    if kind == "experts":
        settings["target_parameters"] = _experts(model)
        inner = [name for name in inner if "q_proj" in name]
    if not inner and kind != "experts":
        raise Unbuildable("there is no linear to adapt")
    # a list and an exclusion that contradict each other are refused
    all_of_them = kind == "all-linear" or case.get("exclude")
    settings["target_modules"] = "all-linear" if all_of_them else inner
    if case.get("exclude"):
        settings["exclude_modules"] = [choose.choice(inner).rpartition(".")[2]]
    if case.get("ranks"):
        name = choose.choice(inner)
        settings |= {"rank_pattern": {name: 2}, "alpha_pattern": {name: 3}}
    if case.get("save_head") and head:
        settings["modules_to_save"] = [head.rpartition(".")[2]]
    return LoraConfig(**settings)


def _experts(model: nn.Module) -> list[str]:
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if not stacks:
        raise Unbuildable("there are no experts")
    return sorted({".".join(name.split(".")[-2:]) for name in stacks})


def fill_adapters(model: nn.Module, case: Case) -> None:
    """Give every adapter parameter a value that depends on its name only, none of them zero."""
    base = dtype_of(case)
    for name, p in model.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            digest = hashlib.sha256(f"{case['seed']} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                p.data.mul_(1 + 0.2 * values)
            else:
                p.data.copy_(0.2 * values)
            if case.get("adapter_dtype") == "same":
                p.data = p.data.to(base)
