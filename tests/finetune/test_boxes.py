"""Rows of object_detection: the ways to write objects, COCO's annotation files, and bad rows."""

import json

import detection_cases as detection
import finetune_cases as cases
import numpy as np
import pytest
from PIL import Image

from peftkit import ContractError
from peftkit.finetune import train


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
        task = detection.task_of(box_format=box_format, classes=detection.CLASSES)
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
    (encoded,) = detection.task_of(classes=detection.CLASSES).encode(row)
    assert json.loads(encoded.features["objects"]) == [[0, 0, 0.0, 3.0, 40.0, 12.0]]


def test_turned_images_are_refused(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    row = {"image": str(tmp_path / "a.jpg"), "objects": []}
    with pytest.raises(Exception, match=r"stored turned or mirrored \(EXIF orientation 6\)"):
        detection.task_of().encode(row)
