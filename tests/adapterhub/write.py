"""Bottleneck adapters by AdapterHub's library, and what they compute there. Runs in that library's environment.

    python tests/adapterhub/write.py FOLDER

Every architecture and kind gets a folder: ``base`` (the model), ``adapter``, and ``outputs.pt`` with inputs and output.
"""

import sys
from pathlib import Path

import adapters
import torch
import transformers as hf
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from torch import Tensor

_ENCODER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
_SEQ2SEQ = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2}
_T5 |= {"num_layers": 2, "num_decoder_layers": 3}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_VISION = {k: v for k, v in _ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
_VISION |= {"image_size": 16, "patch_size": 8}
_DISTILBERT = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}

MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_ENCODER)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_ENCODER)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_ENCODER)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**_ENCODER, embedding_size=16)),
    "deberta-v2": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(**_DISTILBERT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_ENCODER)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_ENCODER, num_key_value_heads=1)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ)),
    "plbart": lambda: hf.PLBartModel(hf.PLBartConfig(**_SEQ2SEQ)),
    "mbart": lambda: hf.MBartModel(hf.MBartConfig(**_SEQ2SEQ)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "mt5": lambda: hf.MT5Model(hf.MT5Config(**_T5)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**_VISION)),
    "clip-text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**_ENCODER)),
    "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_VISION)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_SEQ2SEQ, **_WHISPER, **_SPECIAL)
    ),
}
_SINGLE = ("t5", "mt5", "clip-text")
"""Those whose code in that transformers does not keep to float64."""

KINDS = {
    "double_seq_bn": lambda: DoubleSeqBnConfig(reduction_factor=4, leave_out=[1]),
    "seq_bn": lambda: SeqBnConfig(reduction_factor=4),
    "par_bn": lambda: ParBnConfig(reduction_factor=2, scaling="learned"),
}


def main() -> None:
    """Write every architecture and kind."""
    folder = Path(sys.argv[1])
    for name, build in MODELS.items():
        for kind, config in KINDS.items():
            dtype = torch.float32 if name in _SINGLE else torch.float64
            write(folder / name / kind, build, config(), dtype)
            print(name, kind, flush=True)


def write(folder: Path, build, config, dtype: torch.dtype) -> None:
    """One model with one adapter whose weights are drawn at random."""
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    inputs = inputs_of(model)
    model.save_pretrained(folder / "base")
    adapters.init(model)
    model.add_adapter("oracle", config=config)
    model.set_active_adapters("oracle")
    model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if ".oracle." in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_adapter(str(folder / "adapter"), "oracle")
    with torch.no_grad():
        output = model(**inputs)[0]
    torch.save({"inputs": inputs, "output": output}, folder / "outputs.pt")


def inputs_of(model) -> dict[str, Tensor]:
    """What the model is called with."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).double()}
    if model.main_input_name == "input_features":
        frames = torch.randn(2, 8, 40, generator=generator).double()
        return {"input_features": frames, "decoder_input_ids": ids}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


if __name__ == "__main__":
    main()
