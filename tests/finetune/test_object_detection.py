"""The task object_detection: boxes through resizing and padding, average precision, bad rows, and heads for other classes."""

import importlib.util
import json

import detection_cases as detection
import finetune_cases as cases
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peftkit import ContractError, load_base
from peftkit.finetune import evaluate, train
from peftkit.finetune.average_precision import mean_average_precision
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.object_detection import ObjectDetection

STEPS = {"max_steps": 80, "batch_size": 6, "lr": 3e-3, "head_lr": 3e-3, "checkpoint_every": 40}
PADDING = ("detr", "conditional", "deformable", "yolos")


def task_of(name="detr", processor=None, labels=detection.CLASSES, **options):
    processor = processor or detection.processor(name)
    setting = Setting(processor, 1, ObjectDetection.Options(**options), list(labels))
    setting.config = detection.tiny(name).config
    return ObjectDetection(setting)


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
    task, model = task_of(name), detection.tiny(name)
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
    assert ("pixel_mask" in batch) == (name in PADDING)
    shares = task._shares(model, batch)
    size = batch["pixel_values"].shape[-2:]
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
            "logits": torch.zeros(1, 1, 4),
            "pred_boxes": (labels["boxes"] * share[[1, 0, 1, 0]])[None],
            "shares": share[None],
        }
        predicted, _ = task.counted({"labels": [labels]}, outputs)
        torch.testing.assert_close(predicted[0, 0, 2:], torch.tensor(places[row]).float())


def test_without_padding_the_labels_are_those_of_the_processor(tmp_path):
    rows = detection.rectangles(tmp_path, 3)
    for name in detection.BUILDERS:
        task = task_of(name)
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
    task, model = task_of(), detection.tiny().eval()
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
        other, new = task_of(name), detection.tiny(name)
        for parameter_name, parameter in new.named_parameters():
            if "bbox" in parameter_name:
                torch.nn.init.zeros_(parameter)
        with torch.autocast("cpu", torch.bfloat16):
            other.loss(new, batch_of(other, rows))
        assert other._follows_mask
    yolos = task_of("yolos")
    yolos.loss(detection.tiny("yolos"), batch_of(yolos, rows))
    assert not yolos._follows_mask
    fixed = detection.processor("detr", pad_size={"height": 96, "width": 96})
    padded = task_of("rt_detr", fixed)
    padded.loss(detection.tiny("rt_detr"), batch_of(padded, rows))
    # RT-DETR takes a mask and does not use it.
    assert not padded._follows_mask


def precision(wanted, *found, classes=2):
    most = max(map(len, found))
    rows = [[*image, *[[-100] * 6] * (most - len(image))] for image in found]
    return mean_average_precision(wanted, rows, classes)


def test_average_precision_by_hand():
    first, second = [0, 0, 0, 0, 10, 10], [0, 0, 20, 20, 30, 30]
    right, other = [0, 0, 0, 10, 10], [0, 20, 20, 30, 30]
    # Recall 1/2 with precision 1, recall 1 with 2/3: 51 and 50 of COCO's 101 places.
    found = [[0.9, *right], [0.8, 0, 50, 50, 60, 60], [0.7, *other]]
    expected = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert precision([[first, second]], found) == {"map": expected, "map_50": expected}
    # The same boxes in two images; the order of the scores is over all images.
    assert precision([[first], [second]], found[:2], found[2:])["map"] == expected
    # An IoU of 0.62 is right at three of ten thresholds.
    assert precision([[first]], [[0.5, 0, 0, 0, 10, 6.2]]) == {
        "map": pytest.approx(0.3),
        "map_50": pytest.approx(1.0),
    }
    # A second box on the same object is wrong, but comes after recall 1.
    assert precision([[first]], [[0.9, *right], [0.8, *right]])["map"] == pytest.approx(1.0)
    # The second class is missed; a third class has no object and does not count.
    both = [[first, [1, 0, 40, 0, 50, 10]]]
    assert precision(both, [[0.9, *right]], classes=3)["map"] == pytest.approx(0.5)
    # The right place with another class is wrong.
    assert precision([[first]], [[0.9, 1, 0, 0, 10, 10]])["map"] == 0
    # A box in a crowd is neither right nor wrong.
    crowd = [[first, [0, 1, 15, 15, 35, 35]]]
    assert precision(crowd, [[0.9, *other], [0.8, *right]])["map"] == pytest.approx(1.0)
    assert precision([[first], []], [[0.8, *right]], [[0.9, *right]])["map"] == pytest.approx(0.5)
    with pytest.raises(ContractError, match="no object"):
        precision([[[0, 1, 0, 0, 5, 5]]], [[0.9, *right]])
    with pytest.raises(ContractError, match="not finite"):
        precision([[first]], [[float("nan"), *right]])


def test_an_image_without_objects_is_background(tmp_path):
    rows = detection.rectangles(tmp_path)
    assert rows[-1]["objects"] == []
    for name in detection.BUILDERS:
        task, model = task_of(name), detection.tiny(name)
        (encoded,) = task.encode(rows[-1])
        assert encoded.supervised == 1
        loss, _ = task.loss(model, task.collate([encoded.features]))
        loss.backward()
        assert loss > 0
        heads = {n: p for n, p in model.named_parameters() if "class" in n and n.endswith("weight")}
        assert any(p.grad is not None and p.grad.any() for p in heads.values())
    with pytest.raises(ContractError, match=r"no row of data.train has an object"):
        task.check_rows([encoded.features], "data.train")


def test_all_ways_to_write_objects_are_the_same(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(image)
    written = {
        "xywh": [[10, 5, 8, 10], [0, 0, 40, 20]],
        "xyxy": [[10, 5, 18, 15], [0, 0, 40, 20]],
        "cxcywh-normalised": [[0.35, 0.5, 0.2, 0.5], [0.5, 0.5, 1.0, 1.0]],
    }
    found = []
    for box_format, boxes in written.items():
        task = task_of(box_format=box_format, classes=detection.CLASSES)
        objects = [
            {"bbox": box, "label": label} for box, label in zip(boxes, ("green", 2), strict=True)
        ]
        lists = {"bbox": boxes, "category": [1, "blue"], "area": [1, 2], "iscrowd": [0, 0]}
        for value in (objects, lists):
            found.append(task.encode({"image": str(image), "objects": value})[0].features)
    for features in found:
        objects = json.loads(features["objects"])
        assert [one[:2] for one in objects] == [[1, 0], [2, 0]]
        assert np.allclose([one[2:] for one in objects], written["xyxy"], rtol=1e-12)


def test_a_coco_file_is_read_with_its_crowds(tmp_path, one_thread):
    rows = detection.rectangles(tmp_path / "i")
    names = ["", *detection.CLASSES]
    content = {
        "info": {},
        "categories": [{"id": 7 * n, "name": names[n]} for n in (3, 2, 1)],
        "images": [{"id": n, "file_name": f"i/{n}.png"} for n in range(len(rows))],
        "annotations": [
            {
                "image_id": n,
                "category_id": 7 * names.index(one["label"]),
                "bbox": one["bbox"],
                "iscrowd": 0,
            }
            for n, row in enumerate(rows)
            for one in row["objects"]
        ],
    }
    content["annotations"][0]["iscrowd"] = 1
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    model = detection.save(tmp_path / "m")
    # The boxes of such a file are xywh, whatever those of other files are.
    task = {"name": "object_detection", "box_format": "xyxy"}
    values = cases.recipe(model, task, file, tmp_path / "run", data={"eval": [str(file)]})
    lines = []
    found = train(values, say=lines.append)
    (line,) = [line for line in lines if "0.png" in line]
    assert line.endswith("«red (crowd) 10 7 26 20»")
    assert any("6 rows of 6" in line for line in lines)
    rows[0]["objects"][0]["iscrowd"] = 1
    values = cases.recipe(
        model, "object_detection", rows, tmp_path / "rows", data={"eval": rows[:]}
    )
    assert train(values).metrics == found.metrics
    content["annotations"][1]["category_id"] = 1
    content["annotations"][2]["image_id"] = 99
    file.write_text(json.dumps(content))
    values["data"] = {"train": str(file)}
    with pytest.raises(ContractError) as error:
        train(values | {"out": str(tmp_path / "bad")})
    assert "i/1.png: annotation 2 has category_id 1, which is not one of 21, 14, 7" in str(
        error.value
    )
    assert "image_id 99 is the id of no image" in str(error.value)


FAULTS = {
    "no objects": ({"objects": None}, "column 'objects' is None; it must be a list"),
    "no box": ({"objects": [{"label": "red"}]}, "object 1 has the keys label"),
    "no label": ({"objects": [{"bbox": [1, 1, 5, 5]}]}, "object 1 has the keys bbox"),
    "another class": (
        {"objects": [{"bbox": [1, 1, 5, 5], "label": "pink"}]},
        "object 1 has the label 'pink', which is not one of red, green, blue",
    ),
    "a number without a class": (
        {"objects": [{"bbox": [1, 1, 5, 5], "label": 3}]},
        "object 1 has the label '3'",
    ),
    "three numbers": ({"objects": [{"bbox": [1, 1, 5], "label": "red"}]}, "must have four numbers"),
    "text": ({"objects": [{"bbox": [1, 1, 5, "5"], "label": "red"}]}, "must have four numbers"),
    "not a number": (
        {"objects": [{"bbox": [1, 1, float("nan"), 5], "label": "red"}]},
        "not finite",
    ),
    "no area": ({"objects": [{"bbox": [1, 1, 0, 5], "label": "red"}]}, "has no area, read as xywh"),
    "outside": (
        {"objects": [{"bbox": [40, 1, 20, 5], "label": "red"}]},
        "object 1: bbox=[40, 1, 20, 5] is outside the image of 48 x 72 pixels by 12",
    ),
    "before the image": (
        {"objects": [{"bbox": [-5, 1, 20, 5], "label": "red"}]},
        "outside the image of 48 x 72 pixels by 5",
    ),
    "shares": (
        {"objects": [{"bbox": [0.1, 0.1, 0.5, 0.5], "label": "red"}]},
        "set task.box_format to cxcywh-normalised",
    ),
    "lists of other lengths": (
        {"objects": {"bbox": [[1, 1, 5, 5]], "label": []}},
        "lists of different lengths: 1 of bbox, 0 of label",
    ),
    "more objects than queries": (
        {"objects": [{"bbox": [1, 1, 5, 5], "label": "red"}] * 7},
        "has 7 objects, but the model finds at most 6",
    ),
    "a missing image": ({"image": "/no.png"}, "the image /no.png does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_are_named(fault, tmp_path, one_thread):
    changes, expected = FAULTS[fault]
    rows = detection.rectangles(tmp_path / "i", 4)
    rows[1] |= changes
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    task = {"name": "object_detection", "classes": detection.CLASSES}
    model = detection.save(tmp_path / "m")
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, task, data, tmp_path / "run")
    )
    printed = cases.run("train", file, code=1)
    assert expected in " ".join(printed.split())
    assert "d.jsonl:2: " in printed
    assert not (tmp_path / "run").exists()


def test_a_box_that_sticks_out_by_a_rounding_is_cut(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    row = {"image": str(tmp_path / "a.png"), "objects": [{"bbox": [-0.4, 3, 41, 9], "label": 0}]}
    (encoded,) = task_of(classes=detection.CLASSES).encode(row)
    assert json.loads(encoded.features["objects"]) == [[0, 0, 0.0, 3.0, 40.0, 12.0]]


def test_turned_images_are_refused(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    row = {"image": str(tmp_path / "a.jpg"), "objects": []}
    with pytest.raises(Exception, match=r"stored turned or mirrored \(EXIF orientation 6\)"):
        task_of().encode(row)


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
        task_of()


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
    task = task_of()
    with pytest.raises(ContractError, match="the model's boxes are not finite"):
        task.loss(model, batch_of(task, rows))


@pytest.mark.parametrize("name", ["detr", "deformable", "rt_detr", "yolos"])
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
    found = train(values)
    assert found.problems == []
    assert evaluate(tmp_path / "run", rows[:3])["loss"] == found.metrics["eval_loss"]
    frozen = {"name": "partial", "head": False, "last_blocks": 1}
    with pytest.raises(ContractError, match="the task head is new"):
        train(values | {"strategy": frozen, "out": str(tmp_path / "frozen")})


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
