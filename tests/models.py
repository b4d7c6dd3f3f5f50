"""Tiny models of ten architectures, built from configs with a fixed seed, and batches that fit them.

Nothing is downloaded. ``tiny("llama")`` is the same model, bit for bit, each time it is called.
"""

import torch
import transformers as hf
from torch import nn

VOCAB_SIZE = 96
SEQ2SEQ_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
"""The sizes of a tiny encoder with a decoder, as most configs name them."""
HIDDEN_SIZE = 32
BATCH_SIZE = 2
SEQUENCE_LENGTH = 12
NUM_LABELS = 3

_DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama(dropout: float) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, attention_dropout=dropout))


def _qwen3(dropout: float) -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8, attention_dropout=dropout))


def _gemma3(dropout: float) -> nn.Module:
    config = hf.Gemma3TextConfig(
        **_DECODER,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        attention_dropout=dropout,
    )
    return hf.Gemma3ForCausalLM(config)


def _mistral(dropout: float) -> nn.Module:
    config = hf.MistralConfig(**_DECODER, sliding_window=8, attention_dropout=dropout)
    return hf.MistralForCausalLM(config)


def _phi3(dropout: float) -> nn.Module:
    config = hf.Phi3Config(
        **_DECODER, attention_dropout=dropout, resid_pdrop=dropout, embd_pdrop=dropout
    )
    return hf.Phi3ForCausalLM(config)


def _gpt2(dropout: float) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_inner=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
    )
    return hf.GPT2LMHeadModel(config)


def _opt(dropout: float) -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        word_embed_proj_dim=HIDDEN_SIZE,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return hf.OPTForCausalLM(config)


def _bert(dropout: float) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=NUM_LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return hf.BertForSequenceClassification(config)


def _t5(dropout: float) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=HIDDEN_SIZE,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
    )
    return hf.T5ForConditionalGeneration(config)


def _vit(dropout: float) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=NUM_LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return hf.ViTForImageClassification(config)


_BUILDERS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "opt": _opt,
    "phi3": _phi3,
    "bert": _bert,
    "t5": _t5,
    "vit": _vit,
}
NAMES = tuple(_BUILDERS)
CAUSAL_NAMES = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "phi3")


def tiny(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the tiny model ``name`` in training mode, with SDPA attention and seeded weights.

    Args:
        name: One of ``NAMES``.
        dropout: Probability for every dropout of the architecture.
        dtype: Dtype of all parameters. The seeded weights are drawn in float32 and then cast.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name={name!r} is not a tiny model; the names are {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _BUILDERS[name](dropout)
        with torch.no_grad():
            for parameter in model.parameters():
                # Initial scales near 0.02 and norm weights of exactly one would hide wrong factors.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.set_attn_implementation("sdpa")
    return model.to(dtype).train()


def batch(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make a batch for ``tiny(name)`` with labels, so that ``model(**batch).loss`` is a number.

    Text batches are ``Int64[2, 12]``, the second row padded by three positions (ignored by mask and
    labels); images are ``Float32[2, 3, 16, 16]``.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(BATCH_SIZE, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": _class_labels(generator)}

    shape = (BATCH_SIZE, SEQUENCE_LENGTH)
    input_ids = torch.randint(3, VOCAB_SIZE, shape, generator=generator)
    attention_mask = torch.ones(shape, dtype=torch.long)
    attention_mask[1, -3:] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    if name == "bert":
        labels = _class_labels(generator)
    elif name == "t5":
        labels = torch.randint(3, VOCAB_SIZE, (BATCH_SIZE, 7), generator=generator)
        labels[1, -2:] = -100
    else:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _class_labels(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, NUM_LABELS, (BATCH_SIZE,), generator=generator)
