"""Classes of recordings: each kind of model trains as with plain PEFT, folders are read, and faulty rows are named."""

import copy
import json

import finetune_cases as cases
import pairs
import pytest
import speech_cases
import task_models
import torch
import transformers as hf

from peftkit import ContractError, accelerate
from peftkit.finetune import train
from peftkit.finetune.tasks.audio_classification import AudioClassification
from peftkit.finetune.tasks.base import Setting

KINDS = ("wav2vec2", "hubert", "ast")


def encoded(kind, folder, rate):
    """The task and the rows of three classes."""
    model = speech_cases.save_audio(folder / "m", kind)
    extractor = hf.AutoFeatureExtractor.from_pretrained(model)
    labels, config = ["high", "low", "middle"], hf.AutoConfig.from_pretrained(model)
    task = AudioClassification(
        Setting(extractor, 64, AudioClassification.Options(), labels, config)
    )
    sounds = speech_cases.sounds(folder / "s", 4, rate)
    files = sorted(sounds.rglob("*.wav"), key=lambda file: file.name)
    found = [{"audio": str(file), "label": file.parent.name} for file in files]
    return task, [task.encode(row)[0].features for row in found]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft(kind, tmp_path, one_thread):
    task, rows = encoded(kind, tmp_path, 16000 if kind == "ast" else speech_cases.RATE)
    plain = pairs.adapted(task_models.task_model(f"{kind} audio"))
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "hidden_dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    fused, truth = accelerate(copy.deepcopy(plain)), pairs.in_float64(plain)
    runs = []
    for start in range(0, 12, 3):
        batch = task.collate(rows[start : start + 3])
        exact = batch | {"input_values": batch["input_values"].double()}
        runs.append((pairs.step(fused, batch), pairs.step(plain, batch), pairs.step(truth, exact)))
    pairs.assert_near_enough(runs)


def test_a_spectrogram_model_trains_from_a_folder(tmp_path, one_thread):
    model = speech_cases.save_audio(tmp_path / "m", "ast")
    data = str(speech_cases.sounds(tmp_path / "s", 4, 16000))
    found = train(cases.recipe(model, "audio_classification", data, tmp_path / "run"))
    assert found.problems == []
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["labels"] == ["high", "low", "middle"]


FAULTS = {
    "another rate": ({"audio": "500", "label": "a"}, "has 500 samples a second, but the"),
    "too long": ({"audio": "long", "label": "a"}, "11.0 s, more than task.max_seconds=10"),
    "too short": ({"audio": "short", "label": "a"}, "0.200 s, less than task.min_seconds=0.25"),
    "no label": ({"audio": "good"}, "column 'label' is empty"),
    "no file": ({"audio": "none", "label": "a"}, "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_with_its_line(fault, tmp_path, one_thread):
    bad, expected = FAULTS[fault]
    model = speech_cases.save_audio(tmp_path / "m")
    for name, size, rate in (
        ("good", 300, 1000),
        ("short", 200, 1000),
        ("500", 200, 500),
        ("long", 11000, 1000),
    ):
        speech_cases.write_wav(tmp_path / f"{name}.wav", [0.1] * size, rate)
    rows = [{"audio": "good", "label": "a"}, {"audio": "good", "label": "b"}, bad]
    for row in rows:
        row["audio"] = str(tmp_path / f"{row['audio']}.wav")
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    values = cases.recipe(model, "audio_classification", data, tmp_path / "run")
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values), code=1)
    assert "d.jsonl:3: " in printed
    assert expected in printed


def test_a_folder_without_recordings_is_refused(tmp_path, one_thread):
    model = speech_cases.save_audio(tmp_path / "m")
    values = cases.recipe(model, "audio_classification", str(tmp_path / "m"), tmp_path / "run")
    values["data"]["format"] = "sounds"
    with pytest.raises(ContractError, match=r"has no sounds \(\.wav, \.flac,"):
        train(values)
