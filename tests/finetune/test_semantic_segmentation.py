"""The task semantic_segmentation: masks, ignored pixels, scores, bad rows, and heads for other classes."""

import json

import finetune_cases as cases
import numpy as np
import pytest
import segmentation_cases as segmentation
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file

from peftkit import ContractError, LoraConfig, load_base, wrap
from peftkit.finetune import evaluate, train
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.semantic_segmentation import SemanticSegmentation, segmentation_scores

STEPS = {"max_steps": 30, "batch_size": 6, "lr": 1e-2, "head_lr": 1e-2, "checkpoint_every": 15}


def task_of(labels=("a", "b", "c"), **options):
    size = {"height": segmentation.SIZE, "width": segmentation.SIZE}
    processor = hf.SegformerImageProcessorPil(size=size, do_reduce_labels=True)
    setting = Setting(processor, 1, SemanticSegmentation.Options(**options), list(labels))
    setting.config = segmentation.tiny().config
    return SemanticSegmentation(setting)


def features(task, rows):
    return [task.encode(row)[0].features for row in rows]


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_run_learns_and_is_the_same_when_it_is_loaded(strategy, tmp_path, one_thread):
    # The new head has a batch norm, whose statistics are trained and must be saved with the adapter.
    model = segmentation.save(tmp_path / "m", "backbone")
    data = cases.write_jsonl(tmp_path / "d.jsonl", segmentation.halves(tmp_path / "i"))
    values = cases.recipe(
        model, "semantic_segmentation", data, tmp_path / "run", strategy=strategy, training=STEPS
    )
    values["data"]["eval"] = [str(data)]
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "0.image.png -> «0 47%, 1 50%»" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert result["metrics"]["eval_mean_iou"] >= 0.9
    again = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    for name in ("loss", "mean_iou", "pixel_accuracy"):
        assert again[name] == result["metrics"][f"eval_{name}"]
    if strategy == "lora":
        saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        statistics = next(t for n, t in saved.items() if n.endswith("running_mean"))
        assert statistics.any()


def test_masks_mean_what_they_say_and_ignored_pixels_are_left_out(tmp_path):
    task = task_of(ignore_index=7)
    row = segmentation.halves(tmp_path, 1)[0]
    numbers = np.zeros((32, 32), dtype=np.int64)
    numbers[:, :4], numbers[0] = 2, 7
    (encoded,) = task.encode(row | {"mask": numbers.tolist()})
    assert encoded.supervised == 31 * 32
    batch = task.collate([encoded.features])
    expected = torch.from_numpy(numbers).masked_fill(torch.from_numpy(numbers) == 7, 255)
    assert torch.equal(batch["labels"][0], expected)
    model = segmentation.tiny().eval()
    with torch.no_grad():
        loss, outputs = task.loss(model, batch)
        logits = torch.nn.functional.interpolate(outputs["logits"], (32, 32), mode="bilinear")
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits[:, :, 1:], expected[None, 1:])
    )
    counts, _ = task.counted(batch, outputs)
    found = logits.argmax(1)[0, 1:]
    for c in range(3):
        wanted = expected[1:] == c
        assert counts[0, c].tolist() == [
            int(((found == c) & wanted).sum()),
            int((found == c).sum()),
            int(wanted.sum()),
        ]


def test_scores_leave_out_classes_that_are_not_there():
    found = segmentation_scores([[3, 4, 5], [2, 3, 2], [0, 0, 0]])
    assert found == {"mean_iou": pytest.approx((3 / 6 + 2 / 3) / 2), "pixel_accuracy": 5 / 7}
    assert segmentation_scores([[0, 0, 0]]) == {"mean_iou": 0.0, "pixel_accuracy": 0.0}


FAULTS = {
    "no mask": ({"mask": None}, "column 'mask' is None"),
    "a missing mask": ({"mask": "/no.png"}, "the image /no.png does not exist"),
    "another size": ({"mask": [[0, 1]]}, "has 2 x 1 pixels, but the image has 32 x 32"),
    "a class that does not exist": (
        {"mask": [[9] * 32] * 32},
        "has the number 9, but the classes are 0 to 2",
    ),
    "nothing but ignored pixels": ({"mask": [[255] * 32] * 32}, "no label is left"),
    "numbers that are not whole": ({"mask": [[0.5] * 32] * 32}, "2 axes of whole numbers"),
    "rows of other lengths": ({"mask": [[1], [1, 2]]}, "no array of rows of equal length"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_are_named(fault, tmp_path, one_thread):
    changes, expected = FAULTS[fault]
    rows = segmentation.halves(tmp_path / "i", 3)
    rows[1] |= changes
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    task = {"name": "semantic_segmentation", "classes": ["a", "b", "c"]}
    model = segmentation.save(tmp_path / "m")
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, task, data, tmp_path / "run")
    )
    printed = cases.run("train", file, code=1)
    assert expected in printed
    assert "d.jsonl:2: " in printed
    assert not (tmp_path / "run").exists()


def test_masks_with_colours_and_unfit_processors_are_refused(tmp_path, one_thread):
    rows = segmentation.halves(tmp_path / "i", 2)
    Image.new("RGB", (32, 32)).save(rows[1]["mask"])
    model = segmentation.save(tmp_path / "m")
    task = {"name": "semantic_segmentation", "classes": ["a", "b", "c"]}
    with pytest.raises(ContractError, match=r"row 2: the mask .* has the channels RGB"):
        train(cases.recipe(model, task, rows, tmp_path / "run"))
    with pytest.raises(ContractError, match=r"row 2: the mask .* has the channels RGB"):
        train(cases.recipe(model, "semantic_segmentation", rows, tmp_path / "run"))
    vit = cases.save_model(tmp_path / "vit", "vit")
    with pytest.raises(ContractError, match="does not resize masks with their images"):
        train(cases.recipe(vit, task, rows, tmp_path / "run"))
    with pytest.raises(ContractError, match=r"task.classes has 1 names; give 2 to 255"):
        train(cases.recipe(model, task | {"classes": ["a"]}, rows, tmp_path / "run"))


def test_a_head_for_other_classes_is_new(tmp_path, one_thread):
    model = segmentation.save(tmp_path / "m")
    loaded = load_base(model, auto_class="AutoModelForSemanticSegmentation", num_labels=4)
    assert loaded.decode_head.classifier.out_channels == 4
    before = load_file(model / "model.safetensors")
    assert torch.equal(
        loaded.decode_head.linear_fuse.weight, before["decode_head.linear_fuse.weight"]
    )
    with pytest.raises(ContractError, match="have other shapes"):
        load_base(model, num_labels=4, decoder_hidden_size=12)
    rows = segmentation.halves(tmp_path / "i")
    task = {"name": "semantic_segmentation", "classes": ["a", "b", "c", "d"]}
    values = cases.recipe(model, task, rows, tmp_path / "run", data={"eval": rows[:3]})
    found = train(values)
    assert found.problems == []
    assert evaluate(tmp_path / "run", rows[:3])["loss"] == found.metrics["eval_loss"]
    frozen = {"name": "partial", "head": False, "last_blocks": 1}
    with pytest.raises(ContractError, match="the task head is new"):
        train(values | {"strategy": frozen, "out": str(tmp_path / "frozen")})


@pytest.mark.parametrize("strategy", ["lora", {"name": "partial", "last_blocks": 1}])
def test_a_resumed_run_equals_an_uninterrupted_one(strategy, tmp_path, one_thread):
    model = segmentation.save(tmp_path / "m", "backbone")
    data = cases.write_jsonl(tmp_path / "d.jsonl", segmentation.halves(tmp_path / "i"))
    values = cases.recipe(
        model,
        "semantic_segmentation",
        data,
        tmp_path / "whole",
        strategy=strategy,
        training={"max_steps": 6, "batch_size": 3, "checkpoint_every": 2},
    )
    train(values)
    parts = values | {"out": str(tmp_path / "parts")}
    train(parts | {"training": values["training"] | {"stop_after": 3}})
    train(parts | {"resume": True})
    whole, again = (
        load_file(next((tmp_path / name).glob("*/*model.safetensors")))
        for name in ("whole", "parts")
    )
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_one_step_equals_that_of_peft(tmp_path):
    from peft import get_peft_model

    task = task_of()
    batch = task.collate(features(task, segmentation.halves(tmp_path, 3)))
    results = []
    for make in (wrap, get_peft_model):
        torch.manual_seed(1)
        targets = ["q_proj", "k_proj", "v_proj", "query", "key", "value", "dense1", "dense2"]
        model = segmentation.tiny()
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        config = LoraConfig(
            r=4,
            target_modules=[name for name in targets if name in names],
            modules_to_save=["decode_head"],
        )
        model = make(model, config).train()
        # The same dropped units in both.
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) or "DropPath" in type(module).__name__:
                module.eval()
        loss, _ = task.loss(model, batch)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, ours), (expected, theirs) = results
    torch.testing.assert_close(loss, expected)
    assert ours.keys() == theirs.keys()
    assert any("lora_A" in name for name in ours)
    for parameter_name, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter_name], gradient)
