"""Tiny detectors with their image processors, and images with coloured rectangles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from vision_chat_cases import COLOURS

from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.object_detection import ObjectDetection

CLASSES = list(COLOURS)
SHORTEST = 48


def _backbone(**options: Any) -> Any:
    return hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="basic",
        **options,
    )


_SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": len(CLASSES),
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "dropout": 0.0,
}


def _detr(**options: Any) -> Any:
    backbone = _backbone(out_features=["stage3"])
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, **_SIZES | options))


def _conditional(**options: Any) -> Any:
    backbone = _backbone(out_features=["stage3"])
    config = hf.ConditionalDetrConfig(backbone_config=backbone, **_SIZES | options)
    return hf.ConditionalDetrForObjectDetection(config)


def _deformable(**options: Any) -> Any:
    backbone = _backbone(out_features=["stage2", "stage3"])
    sizes = {"num_feature_levels": 2, "encoder_n_points": 2, "decoder_n_points": 2}
    sizes["two_stage_num_proposals"] = 6
    config = hf.DeformableDetrConfig(backbone_config=backbone, **_SIZES | sizes | options)
    return hf.DeformableDetrForObjectDetection(config)


_HYBRID = {
    "encoder_hidden_dim": 32,
    "encode_proj_layers": [1],
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 8,
    "decoder_in_channels": [32, 32],
    "decoder_ffn_dim": 48,
    "num_feature_levels": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_denoising": 4,
    "hidden_expansion": 0.5,
    "num_labels": len(CLASSES),
}
"""The sizes of detectors with a hybrid encoder: RT-DETR and its successors."""


def _rt(cls: Any, config: Any, **options: Any) -> Any:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3"],
    )
    made = config(
        backbone_config=backbone,
        encoder_in_channels=[16, 24],
        feat_strides=[8, 16],
        decoder_n_points=2,
        **_HYBRID | options,
    )
    return cls(made)


def _rt_detr(**options: Any) -> Any:
    plain = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    return _rt(hf.RTDetrForObjectDetection, hf.RTDetrConfig, **plain, **options)


def _rt_detr_v2(**options: Any) -> Any:
    return _rt(hf.RTDetrV2ForObjectDetection, hf.RTDetrV2Config, decoder_n_levels=2, **options)


def _distributed(cls: Any, config: Any, **options: Any) -> Any:
    """A detector that predicts a distribution for each side of a box."""
    backbone = hf.HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3] * 4,
        stage_numb_of_layers=[1] * 4,
        out_features=["stage3", "stage4"],
    )
    made = config(
        backbone_config=backbone,
        encoder_in_channels=[24, 32],
        feat_strides=[16, 32],
        decoder_n_points=[2, 2],
        max_num_bins=8,
        **_HYBRID | options,
    )
    return cls(made)


def _d_fine(**options: Any) -> Any:
    return _distributed(hf.DFineForObjectDetection, hf.DFineConfig, **options)


def _deimv2(**options: Any) -> Any:
    return _distributed(hf.Deimv2ForObjectDetection, hf.Deimv2Config, **options)


def _in_groups(cls: Any, config: Any, backbone: Any, **options: Any) -> Any:
    """A detector on a plain vision transformer, which trains several groups of queries and uses one."""
    vision = backbone(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
        mlp_ratio=2,
    )
    sizes = {
        "d_model": 32,
        "decoder_ffn_dim": 48,
        "decoder_n_points": 2,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "num_queries": 8,
        "group_detr": 2,
        "c2f_num_blocks": 1,
        "num_labels": len(CLASSES),
        "dropout": 0.0,
    }
    return cls(config(backbone_config=vision, **sizes | options))


def _lw_detr(**options: Any) -> Any:
    kinds = hf.LwDetrForObjectDetection, hf.LwDetrConfig, hf.LwDetrViTConfig
    return _in_groups(*kinds, projector_scale_factors=[1.0], **options)


def _rf_detr(**options: Any) -> Any:
    kinds = hf.RfDetrForObjectDetection, hf.RfDetrConfig, hf.RfDetrDinov2Config
    return _in_groups(*kinds, **options)


def _dab_detr(**options: Any) -> Any:
    sizes = {n: v for n, v in _SIZES.items() if n not in ("d_model", "backbone", "dropout")}
    config = hf.DabDetrConfig(
        backbone_config=_backbone(out_features=["stage3"]), hidden_size=32, **sizes | options
    )
    return hf.DabDetrForObjectDetection(config)


def _yolos(**options: Any) -> Any:
    config = hf.YolosConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[SHORTEST, SHORTEST],
        patch_size=8,
        num_detection_tokens=6,
        num_labels=len(CLASSES),
        hidden_dropout_prob=0.0,
        **options,
    )
    return hf.YolosForObjectDetection(config)


BUILDERS = {
    "detr": (_detr, hf.DetrImageProcessorPil),
    "conditional": (_conditional, hf.ConditionalDetrImageProcessorPil),
    "deformable": (_deformable, hf.DeformableDetrImageProcessorPil),
    "rt_detr": (_rt_detr, hf.RTDetrImageProcessorPil),
    "yolos": (_yolos, hf.YolosImageProcessorPil),
    "d_fine": (_d_fine, hf.RTDetrImageProcessorPil),
    "deimv2": (_deimv2, hf.RTDetrImageProcessorPil),
    "lw_detr": (_lw_detr, hf.DeformableDetrImageProcessorPil),
    "rf_detr": (_rf_detr, hf.DeformableDetrImageProcessorPil),
}
PADDING = ("detr", "conditional", "deformable", "yolos")
"""Models for images of any size, whose processors pad a batch."""
TIED = {
    "deformable": _deformable,
    "deformable refining": lambda: _deformable(with_box_refine=True),
    "deformable in two stages": lambda: _deformable(with_box_refine=True, two_stage=True),
    "rt_detr_v2": _rt_detr_v2,
    "dab_detr": _dab_detr,
}
"""Models whose heads share weights with each other or with modules of the decoder."""


def tiny(name: str = "detr", **options: Any) -> Any:
    """A tiny detector with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name][0](**options).train()


def size_of(name: str) -> dict[str, int]:
    """The size of what a tiny detector takes; the first DETRs and YOLOS take any, the others a fixed one."""
    if name in PADDING:
        return {"shortest_edge": SHORTEST, "longest_edge": 2 * SHORTEST}
    return {"height": 64, "width": 64}


def processor(name: str = "detr", **options: Any) -> Any:
    """The image processor of a tiny detector."""
    return BUILDERS[name][1](**{"size": size_of(name), **options})


def save(folder: Path, name: str = "detr", **options: Any) -> Path:
    """Save a tiny detector with its processor."""
    tiny(name, **options).save_pretrained(folder)
    processor(name).save_pretrained(folder)
    return folder


def task_of(name: str = "detr", images: Any = None, **options: Any) -> Any:
    """The task with the processor of a tiny detector, or ``images``, and all classes."""
    setting = Setting(
        images or processor(name), 1, ObjectDetection.Options(**options), list(CLASSES)
    )
    setting.config = tiny(name).config
    return ObjectDetection(setting)


def rectangles(
    folder: Path, count: int = 6, sizes: Any = ((48, 48), (48, 72), (80, 48))
) -> list[dict[str, Any]]:
    """Images of different sizes with one rectangle in one of three colours, or with two; the last one is empty.

    The boxes are left, top, width and height in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.full((height, width, 3), 30, dtype=np.uint8)
        objects = []
        for one in range(1 + (number % 4 == 1) if number < count - 1 else 0):
            label = CLASSES[(number + one) % 3]
            left, top = int(draw.integers(0, width // 4)), int(draw.integers(0, height // 4))
            if one:
                left, top = width // 2 + left // 2, height // 2 + top // 2
            w, h = int(draw.integers(10, width // 2 - 2)), int(draw.integers(10, height // 2 - 2))
            w, h = min(w, width - left), min(h, height - top)
            pixels[top : top + h, left : left + w] = COLOURS[label]
            objects.append({"bbox": [left, top, w, h], "label": label})
        file = folder / f"{number}.png"
        Image.fromarray(pixels).save(file)
        rows.append({"image": str(file), "objects": objects})
    return rows
