"""The task image_text_retrieval: the model's own loss, recalls over all rows, bad rows, and models that do not fit."""

import json

import finetune_cases as cases
import numpy as np
import pytest
import retrieval_cases as retrieval
import torch
import vision_chat_cases as vision
from PIL import Image
from safetensors.torch import load_file

from peftkit import ContractError, LoraConfig, wrap
from peftkit.finetune import train
from peftkit.finetune.retrieval import recalls
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.image_text_retrieval import ImageTextRetrieval

MODELS = ("clip", "siglip")


def task_of(name, seq_len=20):
    model, processor = retrieval.tiny(name)
    setting = Setting(processor.tokenizer, seq_len, ImageTextRetrieval.Options())
    setting.processor, setting.config = processor, model.config
    return ImageTextRetrieval(setting)


def batch_of(name, folder):
    task = task_of(name)
    rows = retrieval.pairs(folder, 3)
    return task, task.collate([task.encode(row)[0].features for row in rows])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_run_learns_and_can_be_evaluated(name, strategy, tmp_path, one_thread):
    model = retrieval.save(tmp_path / "m", name)
    data = cases.write_jsonl(tmp_path / "d.jsonl", retrieval.pairs(tmp_path / "i", 3))
    lr = 1e-2 if strategy == "lora" else 2e-3
    steps = {"max_steps": 40, "batch_size": 3, "lr": lr, "checkpoint_every": 20}
    values = cases.recipe(
        model, "image_text_retrieval", data, tmp_path / "run", strategy=strategy, training=steps
    )
    values["data"]["eval"] = [str(data)]
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "red.png» ~ «red" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert result["metrics"]["eval_mean_recall"] == 1.0
    again = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    assert again["loss"] == result["metrics"]["eval_loss"]
    assert again["text_to_image_recall_at_5"] == 1.0
    assert "which writes no text" in cases.run("generate", tmp_path / "run", "x", code=1)


def test_recalls_count_each_image_and_text_once():
    images = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]])
    texts = np.array([[1, 0.1], [0, 1], [0.1, 1], [0.9, 0.1]])
    # The first image has two texts. The ranks of the images' best own texts are 1, 2 and 3, those of the texts' images 1, 3, 1 and 2.
    found = recalls(images, texts, [7, 7, 8, 9], [1, 2, 3, 4], (1, 2))
    assert found["image_to_text_recall_at_1"] == pytest.approx(1 / 3)
    assert found["image_to_text_recall_at_2"] == pytest.approx(2 / 3)
    assert found["text_to_image_recall_at_1"] == pytest.approx(2 / 4)
    assert found["text_to_image_recall_at_2"] == pytest.approx(3 / 4)


def test_equal_vectors_find_nothing():
    same = np.ones((3, 4))
    found = recalls(same, same, [1, 2, 3], [1, 2, 3], (1, 2, 3))
    assert [found[f"image_to_text_recall_at_{k}"] for k in (1, 2, 3)] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_model_and_of_the_processor(name, tmp_path):
    task, batch = batch_of(name, tmp_path)
    model, processor = retrieval.tiny(name)
    rows = retrieval.pairs(tmp_path, 3)
    fixed = {"padding": "max_length", "max_length": 20} if name == "siglip" else {"padding": True}
    inputs = processor(
        text=[row["text"] for row in rows],
        images=[Image.open(row["image"]) for row in rows],
        return_tensors="pt",
        **fixed,
    )
    if name == "siglip":
        inputs.pop("attention_mask", None)  # SigLIP's own tokenizer makes none
    expected = model(**inputs, return_loss=True).loss
    torch.testing.assert_close(task.loss(model, batch)[0], expected)


FAULTS = {
    "no text": ({"text": ""}, "d.jsonl:2: column 'text' is empty"),
    "no image": ({"image": None}, "d.jsonl:2: column 'image' is None"),
    "a missing file": ({"image": "/no.png"}, "d.jsonl:2: the image /no.png does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_are_named(fault, tmp_path, one_thread):
    changes, expected = FAULTS[fault]
    model = retrieval.save(tmp_path / "m", "clip")
    rows = retrieval.pairs(tmp_path / "i", 3)
    rows[1] |= changes
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    values = cases.recipe(model, "image_text_retrieval", data, tmp_path / "run")
    assert expected in cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values), code=1)
    assert not (tmp_path / "run").exists()


def test_models_and_settings_that_do_not_fit_are_refused(tmp_path, one_thread):
    rows = retrieval.pairs(tmp_path / "i", 3)
    model = retrieval.save(tmp_path / "m", "clip")

    def refused(model, message, rows=rows, **changes):
        with pytest.raises(ContractError, match=message):
            train(cases.recipe(model, "image_text_retrieval", rows, tmp_path / "run", **changes))

    text = cases.save_model(tmp_path / "text", "llama")
    refused(text, "has no processor of images and texts")
    refused(vision.save(tmp_path / "v", "llava"), "needs a model that compares images with texts")
    refused(model, "compares the rows of a batch, but a batch has 1", rows[:1])
    refused(model, "label_smoothing=0.1 has no effect", training={"label_smoothing": 0.1})


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, one_thread):
    model = retrieval.save(tmp_path / "m", "clip")
    data = cases.write_jsonl(tmp_path / "d.jsonl", retrieval.pairs(tmp_path / "i", 9))
    steps = {"max_steps": 6, "batch_size": 3, "checkpoint_every": 2}
    strategy = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    values = cases.recipe(
        model, "image_text_retrieval", data, tmp_path / "whole", strategy=strategy, training=steps
    )
    train(values)
    parts = values | {"out": str(tmp_path / "parts")}
    train(parts | {"training": values["training"] | {"stop_after": 4}})
    train(parts | {"resume": True})
    whole, again = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize("name", MODELS)
def test_one_step_equals_that_of_peft(name, tmp_path):
    from peft import get_peft_model

    task, batch = batch_of(name, tmp_path)
    results = []
    for make in (wrap, get_peft_model):
        model, _ = retrieval.tiny(name)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
        model = make(model, config).train()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.1)
        loss, _ = task.loss(model, batch)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, ours), (expected, theirs) = results
    torch.testing.assert_close(loss, expected)
    assert ours.keys() == theirs.keys()
    for parameter_name, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter_name], gradient)
