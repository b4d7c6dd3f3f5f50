"""The task object_detection: boxes through resizing and padding, and heads for other classes."""

import importlib.util
import json

import detection_cases as detection
import finetune_cases as cases
import numpy as np
import pytest
import torch
from PIL import Image
from process_cases import as_process
from safetensors.torch import load_file

from peftkit import ContractError, load_base
from peftkit.finetune import evaluate, train

STEPS = {"max_steps": 80, "batch_size": 6, "lr": 3e-3, "head_lr": 3e-3, "checkpoint_every": 40}


def batch_of(task, rows):
    return task.collate([task.encode(row)[0].features for row in rows])


def corners(boxes, size):
    """Corners of boxes in pixels of ``size``, which is height and width."""
    start, extent = boxes.split(2, -1)
    scale = torch.tensor([size[1], size[0]])
    return torch.cat([(start - extent / 2) * scale, (start + extent / 2) * scale], -1)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_run_learns_and_is_the_same_when_it_is_loaded(strategy, tmp_path, one_thread):
    model = detection.save(tmp_path / "m")
    data = cases.write_jsonl(tmp_path / "d.jsonl", detection.rectangles(tmp_path / "i"))
    values = cases.recipe(
        model, "object_detection", data, tmp_path / "run", strategy=strategy, training=STEPS
    )
    values["data"]["eval"] = [str(data)]
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "0.png -> «red 10 7 26 20»" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    # 0.02 without training.
    assert result["metrics"]["eval_map_50"] >= 0.2
    again = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    for name in ("loss", "map", "map_50"):
        assert again[name] == result["metrics"][f"eval_{name}"]
    if strategy == "lora":
        saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        for head in ("class_labels_classifier.weight", "bbox_predictor.layers.2.weight"):
            assert any(name.endswith(head) for name in saved)


@pytest.mark.parametrize("name", detection.BUILDERS)
def test_boxes_are_where_the_objects_are_in_the_pixels(name, tmp_path):
    task, model = detection.task_of(name), detection.tiny(name)
    places = ([10, 5, 30, 45], [60, 8, 90, 30])
    rows = []
    for number, ((width, height), box) in enumerate(zip(((40, 90), (96, 48)), places, strict=True)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        x, y, right, bottom = box
        objects = [{"bbox": [x, y, right - x, bottom - y], "label": "red"}]
        rows.append({"image": str(tmp_path / f"{number}.png"), "objects": objects})
    batch = batch_of(task, rows)
    assert ("pixel_mask" in batch) == ("RTDetr" not in type(task.setting.tokenizer).__name__)
    shares = task._shares(model, batch)
    size = batch["pixel_values"].shape[-2:]
    # DETR and YOLOS have a score for "no object", too.
    width = len(detection.CLASSES) + (name in ("detr", "yolos"))
    if name == "yolos":
        assert (shares < 1).any()
    else:
        assert (shares == 1).all()
    for row, (labels, share) in enumerate(zip(batch["labels"], shares, strict=True)):
        found = batch["pixel_values"][row].mean(0)
        lit = (found > (found.min() + found.max()) / 2).nonzero()
        inner = batch["pixel_mask"][row] if "pixel_mask" in batch else torch.ones(size)
        # Where the model places it, in pixels of the input.
        place = size if name == "yolos" else (int(inner.any(1).sum()), int(inner.any(0).sum()))
        (box,) = corners(labels["boxes"] * share[[1, 0, 1, 0]], place)
        seen = torch.tensor([*lit.min(0).values.flip(0), *(lit.max(0).values + 1).flip(0)])
        assert (box - seen).abs().max() <= 1.0
        # What the model finds there is in the image where the object was.
        outputs = {
            "logits": torch.zeros(1, 1, width),
            "pred_boxes": (labels["boxes"] * share[[1, 0, 1, 0]])[None],
            "shares": share[None],
        }
        predicted, _ = task.counted({"labels": [labels]}, outputs)
        torch.testing.assert_close(predicted[0, 0, 2:], torch.tensor(places[row]).float())


def test_without_padding_the_labels_are_those_of_the_processor(tmp_path):
    rows = detection.rectangles(tmp_path, 3)
    for name in detection.BUILDERS:
        task = detection.task_of(name)
        for row in rows:
            batch = batch_of(task, [row])
            (labels,) = batch["labels"]
            annotations = [
                {
                    "bbox": one["bbox"],
                    "category_id": detection.CLASSES.index(one["label"]),
                    "area": 1,
                }
                for one in row["objects"]
            ]
            theirs = task.setting.tokenizer(
                [Image.open(row["image"]).convert("RGB")],
                annotations=[{"image_id": 1, "annotations": annotations}],
                return_tensors="pt",
            )
            assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
            torch.testing.assert_close(labels["boxes"], theirs["labels"][0]["boxes"])
            assert torch.equal(labels["class_labels"], theirs["labels"][0]["class_labels"])
            assert torch.equal(labels["orig_size"], theirs["labels"][0]["orig_size"])


def test_padding_changes_no_box_of_a_model_that_uses_the_mask(tmp_path):
    rows = detection.rectangles(tmp_path, 3)
    task, model = detection.task_of(), detection.tiny().eval()
    with torch.no_grad():
        _, together = task.loss(model, batch_of(task, rows))
        for row in range(3):
            _, alone = task.loss(model, batch_of(task, rows[row : row + 1]))
            # Convolutions see the padding at the edges, so the boxes are not equal.
            difference = (together["pred_boxes"][row] - alone["pred_boxes"][0]).abs().max()
            assert difference < 0.05
    assert task._follows_mask
    for name in ("conditional", "deformable"):
        # A head that places all boxes in the middle, in 16 bits.
        other, new = detection.task_of(name), detection.tiny(name)
        for parameter_name, parameter in new.named_parameters():
            if "bbox" in parameter_name:
                torch.nn.init.zeros_(parameter)
        with torch.autocast("cpu", torch.bfloat16):
            other.loss(new, batch_of(other, rows))
        assert other._follows_mask
    yolos = detection.task_of("yolos")
    yolos.loss(detection.tiny("yolos"), batch_of(yolos, rows))
    assert not yolos._follows_mask
    fixed = detection.processor("detr", pad_size={"height": 96, "width": 96})
    padded = detection.task_of("rt_detr", fixed)
    padded.loss(detection.tiny("rt_detr"), batch_of(padded, rows))
    # RT-DETR takes a mask and does not use it.
    assert not padded._follows_mask


def test_an_image_without_objects_is_background(tmp_path):
    rows = detection.rectangles(tmp_path)
    assert rows[-1]["objects"] == []
    for name in detection.BUILDERS:
        task, model = detection.task_of(name), detection.tiny(name)
        (encoded,) = task.encode(rows[-1])
        assert encoded.supervised == 1
        loss, _ = task.loss(model, task.collate([encoded.features]))
        loss.backward()
        assert loss > 0
        heads = {n: p for n, p in model.named_parameters() if "class" in n and n.endswith("weight")}
        assert any(p.grad is not None and p.grad.any() for p in heads.values())
    with pytest.raises(ContractError, match=r"no row of data.train has an object"):
        task.check_rows([encoded.features], "data.train")


def test_what_is_missing_is_named(tmp_path, one_thread, monkeypatch):
    rows = detection.rectangles(tmp_path / "i", 3)
    model = detection.save(tmp_path / "m")
    values = cases.recipe(model, "object_detection", rows, tmp_path / "run")
    vit = cases.save_model(tmp_path / "vit", "vit")
    with pytest.raises(ContractError, match="makes no boxes; use a model such as DETR"):
        train(values | {"model": str(vit)})
    with pytest.raises(ContractError, match=r"task.classes has 'a' twice"):
        train(values | {"task": {"name": "object_detection", "classes": ["a", "b", "a"]}})
    with pytest.raises(ContractError, match=r"task.box_format='yxyx' is unknown"):
        train(values | {"task": {"name": "object_detection", "box_format": "yxyx"}})
    for row in rows:
        row["objects"] = []
    with pytest.raises(ContractError, match="no object with a label"):
        train(values)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name)
    )
    with pytest.raises(ContractError, match=r"needs the package scipy.*peftkit\[detection\]"):
        detection.task_of()


def test_the_processor_of_another_kind_of_model_is_refused(tmp_path):
    row = detection.rectangles(tmp_path, 1)[0] | {"objects": []}
    for name in detection.BUILDERS:
        model = detection.tiny(name).eval()
        own = "deformable" if name in ("detr", "yolos") else "detr"
        size = detection.size_of(name)
        for images in (detection.processor(name), detection.processor(own, size=size)):
            task = detection.task_of(name, images)
            batch = batch_of(task, [row])
            with torch.no_grad():
                _, outputs = task.loss(model, batch)
            if type(images) is detection.BUILDERS[name][1]:
                task.counted(batch, outputs)
                continue
            with pytest.raises(ContractError, match="belongs to another kind of model"):
                task.counted(batch, outputs)


def test_a_missing_package_of_a_model_is_named(tmp_path, one_thread, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("TimmBackbone requires the timm library but it was not found")

    monkeypatch.setattr("peftkit.base.load_base", missing)
    rows = detection.rectangles(tmp_path / "i", 3)
    model = detection.save(tmp_path / "m")
    with pytest.raises(ContractError, match="needs a package that is not installed: Timm"):
        train(cases.recipe(model, "object_detection", rows, tmp_path / "run"))


def test_a_base_in_16_bits_is_refused(tmp_path, one_thread):
    rows = detection.rectangles(tmp_path / "i", 3)
    model = detection.save(tmp_path / "m")
    values = cases.recipe(model, "object_detection", rows, tmp_path / "run", base="bf16")
    with pytest.raises(ContractError, match=r"weights in torch.bfloat16.*set base=fp32"):
        train(values)


def test_multiplying_in_16_bits_is_the_same_when_it_is_loaded(tmp_path, one_thread):
    rows = detection.rectangles(tmp_path / "i", 5)
    model = detection.save(tmp_path / "m")
    training = {"precision": "bf16", "batch_size": 3}
    values = cases.recipe(
        model,
        "object_detection",
        rows,
        tmp_path / "run",
        data={"eval": rows[:4]},
        training=training,
    )
    found = train(values)
    assert evaluate(tmp_path / "run", rows[:4])["loss"] == found.metrics["eval_loss"]


def test_weights_that_are_not_finite_stop_the_run(tmp_path, one_thread):
    rows = detection.rectangles(tmp_path / "i", 3)
    model = detection.tiny()
    torch.nn.init.constant_(model.bbox_predictor.layers[0].bias, float("nan"))
    task = detection.task_of()
    with pytest.raises(ContractError, match="the model's boxes are not finite"):
        task.loss(model, batch_of(task, rows))


@pytest.mark.parametrize(
    "name", ["detr", "deformable", "rt_detr", "yolos", "d_fine", "deimv2", "lw_detr", "rf_detr"]
)
def test_a_head_for_other_classes_is_new(name, tmp_path, one_thread):
    model = detection.save(tmp_path / "m", name)
    before = load_file(model / "model.safetensors")
    loaded = load_base(model, auto_class="AutoModelForObjectDetection", num_labels=2)
    assert loaded.config.num_labels == 2
    kept = [n for n, t in loaded.state_dict().items() if n in before and "bbox" in n]
    assert kept
    assert all(torch.equal(loaded.state_dict()[n], before[n]) for n in kept)
    rows = detection.rectangles(tmp_path / "i")
    task = {"name": "object_detection", "classes": ["blue", "red", "green", "none"]}
    values = cases.recipe(model, task, rows, tmp_path / "run", data={"eval": rows[:3]})
    if name in ("lw_detr", "rf_detr"):
        # PEFT finds a head by the end of its name, which another one has as well.
        with pytest.raises(
            ContractError, match=r"(?s)class_embed: the names of other .*strategy=full"
        ):
            train(values)
        values |= {"strategy": "full"}
    found = train(values)
    assert found.problems == []
    assert evaluate(tmp_path / "run", rows[:3])["loss"] == found.metrics["eval_loss"]
    frozen = {"name": "partial", "head": False, "last_blocks": 1}
    with pytest.raises(ContractError, match="the task head is new"):
        train(values | {"strategy": frozen, "out": str(tmp_path / "frozen")})


def test_loading_says_nothing_about_new_heads_and_layers_of_other_processes(
    tmp_path, one_thread, caplog
):
    model = detection.save(tmp_path / "m", "rf_detr")
    rows = detection.rectangles(tmp_path / "i", 3)
    task = {"name": "object_detection", "classes": ["blue", "red", "green", "none"]}
    caplog.clear()
    train(
        cases.recipe(
            model, task, rows, tmp_path / "run", strategy="full", training={"max_steps": 1}
        )
    )
    said = [one.getMessage() for one in caplog.records if one.name.startswith("transformers.")]
    assert not [text for text in said if "LOAD REPORT" in text or "not sharded" in text]


# The denoising queries of RT-DETR are random, and the heads of Deformable DETR are tied.
@pytest.mark.parametrize(
    ("name", "strategy"), [("detr", "lora"), ("deformable", "lora"), ("rt_detr", "full")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(name, strategy, tmp_path, one_thread):
    model = detection.save(tmp_path / "m", name)
    data = cases.write_jsonl(tmp_path / "d.jsonl", detection.rectangles(tmp_path / "i"))
    values = cases.recipe(
        model,
        "object_detection",
        data,
        tmp_path / "whole",
        strategy=strategy,
        training={"max_steps": 6, "batch_size": 3, "checkpoint_every": 2, "lr": 1e-3},
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


def test_a_loss_that_several_processes_cannot_share_is_refused(monkeypatch):
    task, model = detection.task_of(), detection.tiny()

    def other_loss(*args, **kwargs):
        raise AssertionError

    model.loss_function = other_loss
    task.check_model(model, [])
    as_process(monkeypatch, 2)
    with pytest.raises(
        ContractError, match="the loss of DetrForObjectDetection, other_loss, divides"
    ):
        task.check_model(model, [])
    task.check_model(detection.tiny(), [])
