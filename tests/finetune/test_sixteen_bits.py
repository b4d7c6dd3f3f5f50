"""Models for images and recordings train in 16 bits: not all of them cast their inputs, which are float32."""

import json

import finetune_cases as cases
import pytest
import retrieval_cases
import segmentation_cases
import speech_cases
import vision_models
from markers import slow_if

from peftkit.finetune import evaluate, train


def images(folder):
    return cases.images(folder / "i", 4)


def recordings(folder):
    return speech_cases.sounds(folder / "s")


def speech(rate):
    return lambda folder: cases.write_jsonl(
        folder / "d.jsonl", speech_cases.speech(folder / "s", 12, rate)
    )


CONVOLUTIONS = {
    "image_classification": vision_models.CONVOLUTIONS["resnet"],
    "contrastive_images": vision_models.CONVOLUTIONS["convnext"],
}

MODELS = {
    "image_classification": (lambda folder: vision_models.save(folder, "resnet"), images),
    "contrastive_images": (lambda folder: vision_models.save(folder, "convnext"), images),
    "semantic_segmentation": (
        segmentation_cases.save,
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", segmentation_cases.halves(folder / "i", 12)
        ),
    ),
    "image_text_retrieval": (
        lambda folder: retrieval_cases.save(folder, "clip"),
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", retrieval_cases.pairs(folder / "i", 12)
        ),
    ),
    "audio_classification": (speech_cases.save_audio, recordings),
    "speech_ctc": (speech_cases.save_ctc, speech(speech_cases.RATE)),
    "speech_seq2seq": (speech_cases.save_whisper, speech(16000)),
}


NEW_HEADS = ("image_classification", "audio_classification")
"""Random numbers in 16 bits are others than those in 32."""


@pytest.mark.parametrize("strategy", slow_if("full".__eq__, ["lora", "full"]))
@pytest.mark.parametrize("task", MODELS)
def test_a_base_in_bfloat16_is_near_one_in_float32(task, strategy, tmp_path, one_thread):
    save, write = MODELS[task]
    model, data = save(tmp_path / "m"), write(tmp_path)
    name = {"name": "speech_seq2seq", "language": "en"} if task == "speech_seq2seq" else task
    options = {"name": strategy}
    if strategy == "lora" and task in CONVOLUTIONS:
        options["target_modules"] = CONVOLUTIONS[task]
    losses = {}
    for base in ("fp32", "bf16"):
        values = cases.recipe(
            *(model, name, data, tmp_path / base),
            base=base,
            strategy=options,
            data={"eval": 0.25},
            training={"max_steps": 2, "lr": 1e-3, "seq_len": 20, "samples": 0},
        )
        found = train(values)
        assert (found.status, found.problems) == ("finished", [])
        lines = (tmp_path / base / "metrics.jsonl").read_text().splitlines()
        losses[base] = json.loads(lines[0])["loss"]  # before the weights differ
        assert evaluate(tmp_path / base)["loss"] == found.metrics["eval_loss"]
    assert losses["bf16"] != losses["fp32"]
    if task not in NEW_HEADS:
        assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
