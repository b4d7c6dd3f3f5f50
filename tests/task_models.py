"""Tiny models with a task head, a batch for each, and the modules of each that must be trained in full."""

import torch
import transformers as hf
from torch import Tensor, nn

LABELS = 3
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": LABELS,
}
_TEXT = _SIZES | {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
_DECODER = _TEXT | {"num_key_value_heads": 2}
_IMAGE = _SIZES | {"image_size": 16, "patch_size": 4}
_AUDIO = {
    **_SIZES,
    "vocab_size": 20,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 24,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_CONVOLUTIONS = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": LABELS}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "classifier_proj_size": 16,
    "vocab_size": 96,
    "pad_token_id": 0,
    "num_labels": LABELS,
}


def _bert(cls: type, **changes) -> nn.Module:
    return cls(hf.BertConfig(**_TEXT | changes))


def _t5() -> nn.Module:
    return hf.T5ForQuestionAnswering(
        hf.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )


def _clip() -> nn.Module:
    vision = {**_IMAGE, "num_labels": LABELS}
    config = hf.CLIPConfig(text_config={**_TEXT, "eos_token_id": 2}, vision_config=vision)
    config.num_labels = LABELS
    return hf.CLIPForImageClassification(config)


def _detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        num_labels=LABELS,
    )
    return hf.DetrForObjectDetection(config)


def _segformer() -> nn.Module:
    config = hf.SegformerConfig(
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        num_labels=LABELS,
    )
    return hf.SegformerForSemanticSegmentation(config)


BUILDERS = {
    "bert sequence": (lambda: _bert(hf.BertForSequenceClassification), ["classifier"]),
    "bert tokens": (lambda: _bert(hf.BertForTokenClassification), ["classifier"]),
    "bert answers": (lambda: _bert(hf.BertForQuestionAnswering, num_labels=2), ["qa_outputs"]),
    "bert choices": (lambda: _bert(hf.BertForMultipleChoice), ["classifier"]),
    "bert next sentence": (lambda: _bert(hf.BertForNextSentencePrediction), ["cls"]),
    "roberta sequence": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT)),
        ["classifier"],
    ),
    "distilbert sequence": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=LABELS
            )
        ),
        ["pre_classifier", "classifier"],
    ),
    "modernbert tokens": (
        lambda: hf.ModernBertForTokenClassification(
            hf.ModernBertConfig(
                **_TEXT, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
            )
        ),
        ["head", "classifier"],
    ),
    "deberta sequence": (
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_TEXT)),
        ["pooler", "classifier"],
    ),
    "llama sequence": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER)),
        ["score"],
    ),
    "llama tokens": (
        lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**_DECODER)),
        ["score"],
    ),
    "llama answers": (
        lambda: hf.LlamaForQuestionAnswering(hf.LlamaConfig(**_DECODER)),
        ["qa_outputs"],
    ),
    "t5 answers": (_t5, ["qa_outputs"]),
    "vit image": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**_IMAGE)), ["classifier"]),
    "beit image": (
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**_IMAGE)),
        ["classifier"],
    ),
    "swin image": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16,
                patch_size=4,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 4],
                window_size=2,
                num_labels=LABELS,
            )
        ),
        ["classifier"],
    ),
    "clip image": (_clip, ["classifier"]),
    "resnet image": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, layer_type="basic", **_CONVOLUTIONS)
        ),
        ["classifier"],
    ),
    "convnext image": (
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**_CONVOLUTIONS)),
        ["classifier"],
    ),
    "detr objects": (_detr, ["class_labels_classifier", "bbox_predictor"]),
    "segformer segments": (_segformer, ["decode_head"]),
    "wav2vec2 audio": (
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**_AUDIO)),
        ["projector", "classifier"],
    ),
    "hubert audio": (
        lambda: hf.HubertForSequenceClassification(hf.HubertConfig(**_AUDIO)),
        ["projector", "classifier"],
    ),
    "wav2vec2 ctc": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_AUDIO)), ["lm_head"]),
    "wav2vec2 frames": (
        lambda: hf.Wav2Vec2ForAudioFrameClassification(hf.Wav2Vec2Config(**_AUDIO)),
        ["classifier"],
    ),
    "whisper audio": (
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**_WHISPER)),
        ["projector", "classifier"],
    ),
    "ast audio": (
        lambda: hf.ASTForAudioClassification(
            hf.ASTConfig(**_SIZES, patch_size=4, num_mel_bins=8, max_length=16)
        ),
        ["classifier"],
    ),
    "videomae video": (
        lambda: hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(**_IMAGE, num_frames=4, tubelet_size=2)
        ),
        ["classifier"],
    ),
}
"""A builder and the names of the heads, by architecture and task."""


def task_model(name: str, head_seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode. Its backbone is always the same.

    Args:
        name: A key of ``BUILDERS``.
        head_seed: Seed of the head's weights. Other numbers give other weights, as loading a checkpoint without a head does.
    """
    build, heads = BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        torch.manual_seed(head_seed)
        for head in heads:
            for parameter in model.get_submodule(head).parameters():
                parameter.data.normal_(std=0.3)
    return model


def batch(name: str) -> dict[str, Tensor]:
    """Inputs for ``task_model(name)``, without labels."""
    generator = torch.Generator().manual_seed(1)
    kind = name.split()[-1]
    if kind in ("image", "objects", "segments"):
        size = (
            32
            if name in ("detr objects", "segformer segments", "resnet image", "convnext image")
            else 16
        )
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if kind == "video":
        return {"pixel_values": torch.randn(2, 4, 3, 16, 16, generator=generator)}
    if name == "whisper audio":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    if name == "ast audio":
        return {"input_values": torch.randn(2, 16, 8, generator=generator)}
    if kind in ("audio", "ctc", "frames"):
        return {"input_values": torch.randn(2, 400, generator=generator)}
    shape = (2, 3, 12) if kind == "choices" else (2, 12)
    return {"input_ids": torch.randint(3, 96, shape, generator=generator)}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The floating-point outputs that depend on the head."""
    found = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "pred_boxes")
    return [found[name] for name in names if name in found]
