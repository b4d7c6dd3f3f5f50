"""Recipes for runs in one and in two processes, and what is compared of them."""

from __future__ import annotations

import json
from functools import partial

import detection_cases
import finetune_cases as cases
import numpy as np
import retrieval_cases
import segmentation_cases
import torch
import unlabelled_cases
from finetune_processes import torchrun
from PIL import Image
from safetensors.torch import load_file


def write_recipe(model, tmp_path, task="sft", training=None, rows=None, **changes):
    """A recipe of batches of 4 rows, and the 40 rows; all but 8 are for training."""
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows or cases.chats(40))
    settings = {"max_steps": 6, "checkpoint_every": 3, "samples": 1, "best_metric": "last"}
    # Adam divides by the gradient, so the rounding of a gradient near zero would decide about a whole update.
    settings |= {"optimizer": "sgd", "lr": 0.3}
    values = cases.recipe(
        model,
        task,
        data,
        tmp_path / "whole",
        data={"eval": 0.2},
        training={**settings, **(training or {})},
        **changes,
    )
    return cases.write_recipe(tmp_path / "r.yaml", values)


def weights(folder):
    (file,) = folder.glob("[am][do][ad]*/*model.safetensors")  # adapter or model
    return load_file(file)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor(
        [v for line in lines for n, v in line.items() if n in ("loss", "eval_loss")]
    )


def largest(first, second):
    return max((first[name].float() - second[name].float()).abs().max() for name in first)


def assert_trained_alike(whole, splits, parts):
    """``parts`` may differ from ``whole`` by twice as much as ``splits``, which add the same batches in parts in one process."""
    assert len(losses(whole)) == len(losses(parts)) == 8
    first, second = weights(whole), weights(parts)
    rival = max(largest(first, weights(split)) for split in splits)
    assert first.keys() == second.keys()
    eps = torch.finfo(torch.float32).eps
    moved = max(tensor.float().abs().max() for tensor in first.values())
    assert largest(first, second) <= 2 * rival + eps * moved
    rival = max((losses(whole) - losses(split)).abs().max() for split in splits)
    allowed = 2 * rival + eps * losses(whole).abs().max()
    assert (losses(whole) - losses(parts)).abs().max() <= allowed
    # Otherwise a run on other rows would pass.
    assert losses(whole).diff().abs().min() > 10 * allowed


def files(folder):
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    return {name for name in found if "rng_state" not in name}


def run_three(file, tmp_path, *arguments, **wanted):
    """The run in one process, in one process with one row or half the rows in a forward, and in two processes."""
    half = "training.batch_size=2", "training.eval_batch_size=4"
    cases.run("train", file)
    for rows in (1, 2):
        split = f"training.batch_size={rows}", f"training.gradient_accumulation={4 // rows}"
        cases.run("train", file, *split, half[1], f"out={tmp_path / f'split-{rows}'}")
    parts = tmp_path / "parts"
    printed = torchrun(
        "train", file, half[0], "training.eval_batch_size=2", f"out={parts}", *arguments, **wanted
    )
    assert_trained_alike(tmp_path / "whole", [tmp_path / "split-1", tmp_path / "split-2"], parts)
    return printed


def as_process(monkeypatch, count):
    for name, value in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def segformer_without_dropout(folder):
    file = segmentation_cases.save(folder) / "config.json"
    none = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | none))
    return folder


def partly_labelled(rows):
    """Rows of masks with other numbers of labelled pixels each."""
    for number, row in enumerate(rows):
        mask = np.array(Image.open(row["mask"]))
        mask[: number % 30] = 255
        Image.fromarray(mask).save(row["mask"])
    return rows


def detector(name, **options):
    """Images of one size, because convolutions see the padding of a batch. The last batch of the evaluation has one row."""
    return (
        lambda folder: detection_cases.save(folder, name, **options),
        lambda folder: detection_cases.rectangles(folder / "images", 25, [(48, 48)]),
        {"task": "object_detection"},
    )


WHOLE_BATCHES = {
    "embeddings": (
        partial(cases.save_model, name="bert"),
        lambda folder: [
            {"anchor": chr(97 + i % 26) + "x" * (i // 26), "positive": f"{i} {chr(97 + i % 26)}"}
            for i in range(35)
        ],
        {"task": {"name": "embeddings", "chunk": 1}},
    ),
    "contrastive_images": (
        unlabelled_cases.vit_with_pooler,
        lambda folder: segmentation_cases.halves(folder / "images", 35),
        {"task": "contrastive_images", "strategy": "full"},
    ),
    "CLIP": (
        partial(retrieval_cases.save, name="clip"),
        lambda folder: retrieval_cases.pairs(folder / "images", 35),
        {"task": "image_text_retrieval", "strategy": "full"},
    ),
    "SigLIP": (
        partial(retrieval_cases.save, name="siglip"),
        lambda folder: retrieval_cases.pairs(folder / "images", 35),
        {"task": "image_text_retrieval"},
    ),
    "segmentation": (
        segformer_without_dropout,
        lambda folder: partly_labelled(segmentation_cases.halves(folder / "images", 35)),
        # The batch norm of the head, if it is trained, normalises the rows of its process. Without the head gradients are small.
        {
            "task": "semantic_segmentation",
            "strategy": {"name": "lora", "modules_to_save": []},
            "training": {"lr": 100.0},
        },
    ),
    "DETR": detector("detr", auxiliary_loss=True),
    "YOLOS": detector("yolos"),
    "Deformable DETR": detector("deformable"),
    # denoising draws noise
    "RT-DETR": detector("rt_detr", num_denoising=0),
    "LW-DETR": detector("lw_detr"),
}
"""Tasks whose loss of a batch is not the mean over its rows, with a model, rows and the recipe. 7 rows are for the evaluation."""
