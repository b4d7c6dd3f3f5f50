"""peftkit's own methods in place of PEFT's in PEFT's common tests; used by ``plugin.py`` in mode ``own``.

The tests use PEFT's argument names: ``init_weights=False`` for an adapter that changes the outputs from the start, and
``layers_to_transform`` for layer numbers. Three classes translate these arguments and return configs of ours, so that PEFT gets only
our configs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from peftkit import bridge
from peftkit.bottleneck import inject

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
"""Test modules of PEFT that run on a list of configs, and the task of their models."""

NO_MERGE = "prefixes and bottlenecks are not linear in a layer's input, so they cannot be merged into its weight; merging is refused"
NO_DISPATCH = "the model computes its attention itself, so a prefix is refused; the error names BottleneckConfig and LoraConfig"
NO_AVERAGE = "adapters with a prefix or a bottleneck cannot be averaged; the error says so"
ONE_SUBSTRING = (
    "the test finds the adapter's parameters by one substring of their names, and a mix needs three; "
    "tests/test_contract.py checks which parameters a mix trains"
)

_WITHOUT_DISPATCH = ("GPTJ", "Deberta")


class BottleneckConfig(bridge.BottleneckConfig):
    """Returns our ``BottleneckConfig`` for the arguments of PEFT's tests."""

    def __new__(cls, *args: Any, init_weights=True, layers_to_transform=None, **kwargs: Any) -> Any:
        config = bridge.BottleneckConfig(*args, layers=layers_to_transform, **kwargs)
        config.drawn_anew = not init_weights
        return config


class PrefixConfig(bridge.PrefixConfig):
    """Returns our ``PrefixConfig``. A prefix without a gate always changes the outputs, so ``init_weights`` is ignored."""

    def __new__(cls, *args: Any, init_weights=True, layers_to_transform=None, **kwargs: Any) -> Any:
        return bridge.PrefixConfig(*args, layers=layers_to_transform, **kwargs)


class MixConfig(bridge.MixConfig):
    """Returns our config of LoRA with a prefix and a bottleneck."""

    def __new__(cls, *args: Any, init_weights=True, **kwargs: Any) -> Any:
        kwargs.setdefault("init_lora_weights", init_weights)
        return bridge.MixConfig(*args, **kwargs)


CONFIGS = (
    (BottleneckConfig, {"bottleneck_size": 4}),
    (PrefixConfig, {"num_virtual_tokens": 4, "init_std": 1.0}),
    (
        MixConfig,
        {
            "r": 8,
            "prefix_config": {"num_virtual_tokens": 4},
            "bottleneck_config": {"bottleneck_size": 4},
        },
    ),
)
NAMES = tuple(config.__name__ for config, _ in CONFIGS)


def install() -> None:
    """Replace the configs of PEFT's test modules by ours, and skip the tests that merge."""
    from tests import testing_common

    for name, task in TASKS.items():
        module = import_module(f"tests.{name}")
        module.ALL_CONFIGS[:] = [
            (config, {**kwargs, "task_type": task}) for config, kwargs in CONFIGS
        ]
    known, build = testing_common._skip_if_merging_not_supported, inject.build

    def skip_merging(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        if config_cls.__name__ in NAMES:
            pytest.skip(NO_MERGE)
        known(model_id, config_cls, config_kwargs)

    def build_drawn_anew(module: Any, model: Any, config: Any) -> Any:
        adapter = build(module, model, config)
        if getattr(config, "drawn_anew", False) and not adapter.up.weight.is_meta:
            adapter.up.reset_parameters()
        return adapter

    testing_common._skip_if_merging_not_supported = skip_merging
    inject.build = build_drawn_anew


def method_of(test: str) -> str | None:
    """The config class of ours that a test id names, or ``None``."""
    return next((name for name in NAMES if f"[{name}-" in test or f"-{name}-" in test), None)


def reason_against(test: str) -> str | None:
    """Why a test cannot pass, judged by its id, or ``None``."""
    method = method_of(test)
    if method == "MixConfig" and "weighted_combination" in test:
        return NO_AVERAGE
    if method == "MixConfig" and "::test_training" in test:
        return ONE_SUBSTRING
    without = method != "BottleneckConfig" and any(name in test for name in _WITHOUT_DISPATCH)
    return NO_DISPATCH if without else None
