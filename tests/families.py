"""More tiny models with seeded weights, of families whose blocks are built differently. Nothing is downloaded."""

import models
import torch
import transformers as hf
from torch import nn

_DECODER = models._DECODER
_ENCODER = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_SEQ2SEQ = {
    "vocab_size": models.VOCAB_SIZE,
    **models.SEQ2SEQ_SIZES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _clip() -> nn.Module:
    text = _TOWER | {"vocab_size": models.VOCAB_SIZE, "max_position_embeddings": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = _TOWER | {"image_size": 16, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _wav2vec2() -> nn.Module:
    conv = {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16}
    conv |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 7}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_TOWER, vocab_size=32, **conv))


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BUILDERS = {
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_DECODER)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_DECODER)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_DECODER)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_ENCODER)),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_DECODER, **_MOE, head_dim=8, mlp_only_layers=[1])
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_DECODER, head_dim=8, num_local_experts=4, sliding_window=8)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    ),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_ENCODER, embedding_size=32)),
    "deberta_v2": lambda: hf.DebertaV2ForMaskedLM(
        hf.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **_ENCODER, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        )
    ),
    "clip": _clip,
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=32
        )
    ),
    "wav2vec2": _wav2vec2,
}
NAMES = (*models.NAMES, *_BUILDERS)


def family(name: str) -> nn.Module:
    """A tiny model of one family in evaluation mode, from ``models`` or from this file."""
    if name in models.NAMES:
        return models.tiny(name).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
