"""Building the model of each library and method for ``suite_row.py``. Libraries are imported when they are used: some need their own environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Sizes(NamedTuple):
    """The numbers of a point that a model is built with; as in ``points.Point``."""

    method: str
    rank: int
    adapters: int
    checkpointing: bool
    dtype: torch.dtype
    device: str


class Built(NamedTuple):
    """A model that is ready to train.

    Attributes:
        model: The model.
        trained: The names of the parameters that the method must train.
        are_new: Whether the base model lacks these parameters.
    """

    model: Any
    trained: set[str]
    are_new: bool = True


MODULES = {
    "PEFT": "peft",
    "PEFT compiled": "peft",
    "adapters": "adapters",
    "Liger": "liger_kernel",
    "Unsloth": "unsloth",
}
"""The module that must be installed for a library."""


def build(library: str, folder: Path, sizes: Sizes, own_start: bool = False) -> Built:
    """Load the base model from its folder and prepare it for the method. Every library starts with the same weights.

    Args:
        library: A key of ``_BUILDERS``.
        folder: The base model.
        sizes: The numbers of the point.
        own_start: Whether new parameters keep the values that the library gives them.
    """
    built = _BUILDERS[library](folder, sizes)
    if built.are_new and not own_start:
        same_start(built)
    return built._replace(model=built.model.to(sizes.device).train())


def same_start(built: Built) -> None:
    """Give the matrices and biases of an adapter the same random values in every library, none of them zero, so that every gradient counts.

    DoRA's magnitudes stay: they are the norms of the base weights.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.model.named_parameters():
        if name in built.trained and (parameter.dim() >= 2 or name.endswith(".bias")):
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)


def _base(folder: Path, sizes: Sizes, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=sizes.dtype, **options)
    if sizes.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _added(wrapped: Any, before: set[int]) -> set[str]:
    """The names of parameters that the base model does not have."""
    return {name for name, p in wrapped.named_parameters() if id(p) not in before}


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters()}


def _quantised(model: Any, sizes: Sizes) -> Any:
    if not sizes.method.startswith("qlora-"):
        return model
    from peftkit import load_base

    return load_base(model, sizes.method.removeprefix("qlora-"), compute_dtype=sizes.dtype)


def lora_config(model: Any, rank: int, use_dora: bool = False) -> Any:
    """LoRA or DoRA on the layers that peftkit's "all-linear" selects."""
    from peft import LoraConfig

    from peftkit.find.targets import fill_targets

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=use_dora, task_type="CAUSAL_LM")
    fill_targets(model, config)
    return config


def _more_adapters(wrapped: Any, config: Any, sizes: Sizes) -> None:
    """Load the other adapters. They are not trained."""
    for number in range(1, sizes.adapters):
        wrapped.add_adapter(f"other{number}", config)


def _peft(folder: Path, sizes: Sizes) -> Built:
    from peft import PrefixTuningConfig, get_peft_model

    model = _quantised(_base(folder, sizes), sizes)
    before = _ids(model)
    if sizes.method == "prefix":
        config = PrefixTuningConfig(num_virtual_tokens=sizes.rank, task_type="CAUSAL_LM")
    else:
        config = lora_config(model, sizes.rank, sizes.method == "dora")
    wrapped = get_peft_model(model, config)
    trained = _added(wrapped, before)
    _more_adapters(wrapped, config, sizes)
    return Built(wrapped, trained)


def _peft_compiled(folder: Path, sizes: Sizes) -> Built:
    built = _peft(folder, sizes)
    built.model.compile()
    return built


def _peftkit(folder: Path, sizes: Sizes) -> Built:
    from peftkit import accelerate, wrap

    if sizes.method in ("full", "partial"):
        built = _transformers(folder, sizes)
        accelerate(built.model)
        return built
    model = _quantised(_base(folder, sizes), sizes)
    before, config = _ids(model), _own_config(model, sizes)
    wrapped = wrap(model, config)
    trained = _added(wrapped, before)
    _more_adapters(wrapped, config, sizes)
    return Built(wrapped, trained)


def _own_config(model: Any, sizes: Sizes) -> Any:
    from peftkit import BottleneckConfig, PrefixConfig

    if sizes.method == "prefix":
        return PrefixConfig(num_virtual_tokens=sizes.rank, task_type="CAUSAL_LM")
    if sizes.method == "bottleneck":
        size = bottleneck_size(model, sizes.rank)
        return BottleneckConfig(bottleneck_size=size, task_type="CAUSAL_LM")
    return lora_config(model, sizes.rank, sizes.method == "dora")


def bottleneck_size(model: Any, rank: int) -> int:
    """The size at which bottlenecks on attention and MLP have as many parameters as LoRA of ``rank`` on all linears of the layers."""
    linears = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    ]
    wanted = sum(rank * (m.in_features + m.out_features) for m in linears)
    width, count = model.config.hidden_size, 2 * model.config.num_hidden_layers
    # one adapter has two matrices of width x size, and biases of size and of width
    return max(1, round((wanted / count - width) / (2 * width + 1)))


def _plain(folder: Path, sizes: Sizes) -> Built:
    """Modules of peftkit by their definition: eager attention, joined keys, and torch's own operations with autograd."""
    from functools import partial

    from peftkit import restore
    from peftkit.bottleneck import module
    from peftkit_kernels.ops.bottleneck import bottleneck

    module.bottleneck = partial(bottleneck, backend="reference")
    built = _peftkit(folder, sizes)
    restore(built.model)
    built.model.get_base_model().set_attn_implementation("eager")
    return built


def _transformers(folder: Path, sizes: Sizes) -> Built:
    model = _base(folder, sizes)
    if sizes.method == "partial":
        last = f".layers.{model.config.num_hidden_layers - 1}."
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(last in f".{name}")
    return Built(model, _trainable(model), are_new=False)


def _liger(folder: Path, sizes: Sizes) -> Built:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    build_plain = _transformers if sizes.method == "full" else _peft
    built = build_plain(folder, sizes)
    inner = built.model if sizes.method == "full" else built.model.get_base_model()
    _apply_liger_kernel_to_instance(model=inner)
    return built


def _unsloth(folder: Path, sizes: Sizes) -> Built:
    from unsloth import FastLanguageModel

    full = sizes.method == "full"
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=sizes.dtype, load_in_4bit=False, full_finetuning=full
    )
    if full:
        return Built(model, _trainable(model), are_new=False)
    before = _ids(model)
    linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    wrapped = FastLanguageModel.get_peft_model(
        model,
        r=sizes.rank,
        lora_alpha=2 * sizes.rank,
        target_modules=linears,
        use_gradient_checkpointing=sizes.checkpointing,
    )
    return Built(wrapped, _added(wrapped, before))


def _adapterhub(folder: Path, sizes: Sizes) -> Built:
    import adapters
    from adapters import DoubleSeqBnConfig, PrefixTuningConfig

    model = _base(folder, sizes)
    before = _ids(model)
    config: Any = PrefixTuningConfig(flat=True, prefix_length=sizes.rank)
    if sizes.method == "bottleneck":
        # the library rounds width / factor down
        factor = model.config.hidden_size / (bottleneck_size(model, sizes.rank) + 0.5)
        config = DoubleSeqBnConfig(reduction_factor=factor, non_linearity="relu")
    adapters.init(model)
    model.add_adapter("suite", config=config)
    model.train_adapter("suite")
    return Built(model, _added(model, before))


_BUILDERS: dict[str, Callable[[Path, Sizes], Built]] = {
    "transformers": _transformers,
    "PEFT": _peft,
    "PEFT compiled": _peft_compiled,
    "plain torch": _plain,
    "peftkit": _peftkit,
    "adapters": _adapterhub,
    "Liger": _liger,
    "Unsloth": _unsloth,
}
