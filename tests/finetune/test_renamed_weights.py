"""Models whose weights have other names in files than in memory: resuming and the best checkpoint bring back every weight."""

import json

import finetune_cases as cases
import pytest
import segmentation_cases as segmentation
import torch
import transformers as hf
import vision_chat_cases as vision
from safetensors.torch import load_file, save_file

import peftkit.finetune.trainer as trainer_module
from peftkit import ContractError
from peftkit.finetune import train

BUILT = {
    "vit": (
        "image_classification",
        lambda folder: cases.save_model(folder / "m", "vit"),
        lambda folder: str(cases.images(folder / "i")),
    ),
    "llava": (
        "vision_chat",
        lambda folder: vision.save(folder / "m", "llava"),
        lambda folder: str(cases.write_jsonl(folder / "d.jsonl", vision.chats(folder / "i"))),
    ),
    "segformer": (
        "semantic_segmentation",
        lambda folder: segmentation.save(folder / "m", "backbone"),
        lambda folder: str(
            cases.write_jsonl(folder / "d.jsonl", segmentation.halves(folder / "i", 12))
        ),
    ),
}


def recipe(name, tmp_path, **training):
    task, model, data = BUILT[name]
    steps = {"max_steps": 6, "batch_size": 4, "checkpoint_every": 2, "samples": 0, "lr": 1e-3}
    return cases.recipe(
        model(tmp_path),
        task,
        data(tmp_path),
        tmp_path / "whole",
        strategy="full",
        data={"eval": 0.25},
        training=steps | training,
    )


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("name", BUILT)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path, one_thread):
    values = recipe(name, tmp_path)
    train(values)
    parts = values | {"out": str(tmp_path / "parts")}
    train(parts | {"training": values["training"] | {"stop_after": 3}})
    train(parts | {"resume": True})
    whole, again = (
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("whole", "parts")
    )
    assert differing(whole, again) == []


def test_the_best_checkpoint_is_loaded_with_every_weight(tmp_path, one_thread):
    train(recipe("vit", tmp_path, max_steps=12, keep_checkpoints=9, lr=5e-3))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    scores = {e["step"]: e["eval_accuracy"] for e in map(json.loads, lines) if "eval_loss" in e}
    best = max(scores, key=lambda step: scores[step])
    assert best < 12
    load = hf.AutoModelForImageClassification.from_pretrained
    saved = load(tmp_path / "whole" / "model").state_dict()
    same = [
        step
        for step in scores
        if not differing(
            load(tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}").state_dict(), saved
        )
    ]
    assert same == [best]


def test_the_saved_model_has_the_names_of_files(tmp_path, one_thread):
    values = recipe("vit", tmp_path)
    train(values)
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    hf.AutoModelForImageClassification.from_pretrained(tmp_path / "m").save_pretrained(
        tmp_path / "stock"
    )
    assert saved.keys() == load_file(tmp_path / "stock" / "model.safetensors").keys()


def test_a_checkpoint_without_a_weight_is_refused(tmp_path, one_thread, monkeypatch):
    values = recipe("vit", tmp_path)
    train(values | {"training": values["training"] | {"stop_after": 3}})
    file = tmp_path / "whole" / "checkpoints" / "checkpoint-3" / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors["other"] = tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr("peftkit.finetune.run_folder.is_whole", lambda folder, read: True)
    with pytest.raises(ContractError, match=rf"1 weight missing, 1 left over:\s+{lost}"):
        train(values | {"resume": True})


def test_without_the_names_in_memory_weights_would_be_lost(tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(trainer_module.RecipeTrainer, "_save", hf.Trainer._save)
    with pytest.raises(ContractError, match=r"32 weights missing, 32 left over"):
        train(recipe("vit", tmp_path))
