"""Tiny causal language models with LoRA, stock and logit-free, and a mode that keeps float64 in float64."""

import copy

import models
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode

from peftkit.fuse.loss import install_logit_free

DECODER = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": models.HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The grouped product of experts does not support float64.
MOE = {
    "experts_implementation": "eager",
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
OTHERS = {
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=7.0,
            tie_word_embeddings=False,
        )
    ),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**DECODER, logits_scaling=3.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**DECODER, logit_scale=0.3)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**DECODER, **MOE, num_local_experts=4)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, **MOE, head_dim=8, num_experts=4, moe_intermediate_size=16)
    ),
}
FAMILIES = (*models.CAUSAL_NAMES, *OTHERS)
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn"],
    "init_lora_weights": False,
}


class AllDouble(TorchFunctionMode):
    """Replaces the models' casts to float32 (norms, routers, the stock loss) by casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def base_model(name="llama", dtype=torch.float64):
    if name in models.CAUSAL_NAMES:
        return models.tiny(name, dtype=dtype)
    torch.manual_seed(0)
    model = OTHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def peft_model(name="llama", dtype=torch.float64, **config):
    torch.manual_seed(1)
    config = LoraConfig(**{**LORA, "fan_in_fan_out": name == "gpt2", **config})
    return get_peft_model(base_model(name, dtype), config)


def pair(name="llama", dtype=torch.float64, **config):
    """Two copies of a PEFT model; the second is logit-free."""
    stock = peft_model(name, dtype, **config)
    ours = copy.deepcopy(stock)
    assert install_logit_free(ours) is None
    return stock, ours
