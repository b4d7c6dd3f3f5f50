"""Mixtures of experts whose stacks have rows of whole blocks, as checkpoints, and copies with the decoded values."""

import torch
import transformers as hf
from bitsandbytes import functional as bnb
from bitsandbytes.nn.parametrize import replace_parameter_4bit

from peftkit import load_base

STACKS = ("gate_up_proj", "down_proj")

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
}
_BUILDERS = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SIZES, num_local_experts=4, intermediate_size=128)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SIZES, head_dim=16, num_experts=4, moe_intermediate_size=128)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(**_SIZES, num_experts=4, intermediate_size=128)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_SIZES,
            head_dim=16,
            num_local_experts=4,
            intermediate_size=128,
            layer_types=["full_attention"] * 2,
        )
    ),
}
NAMES = tuple(_BUILDERS)


def saved(name, folder, dtype=torch.float32):
    torch.manual_seed(0)
    model = _BUILDERS[name]().to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def experts_of(model):
    """The modules with stacks, by name."""
    return {n: m for n, m in model.named_modules() if n.endswith(".experts")}


def packed_by_bitsandbytes(model):
    """Pack the stacks of a model by bitsandbytes' own function."""
    for module in experts_of(model).values():
        for name in STACKS:
            replace_parameter_4bit(module, name, compress_statistics=True, blocksize=64)
    return model


def decoded(model, folder):
    """The model of a folder, unquantised, with the values to which ``model`` decodes its weights."""
    dense = load_base(folder, "fp32")
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(weight)
    for name, module in experts_of(model).items():
        for own in STACKS:
            getattr(dense.get_submodule(name), own).data.copy_(getattr(module, own))
    return dense
