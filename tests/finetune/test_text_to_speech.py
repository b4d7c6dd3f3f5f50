"""Speech from text: targets are those of transformers' processor, padding does not count, evaluations repeat, runs learn and resume."""

import json

import finetune_cases as cases
import numpy as np
import pytest
import speech_cases
import torch
import transformers as hf

from peftkit import ContractError
from peftkit.finetune import evaluate, train
from peftkit.finetune.sound import read_sound
from peftkit.finetune.tasks.base import BadRow, Setting
from peftkit.finetune.tasks.text_to_speech import TextToSpeech

RATE = 16000
FACTOR = 2


def make(folder, **options):
    processor = hf.AutoProcessor.from_pretrained(folder)
    config = hf.AutoConfig.from_pretrained(folder)
    setting = Setting(processor.tokenizer, 20, TextToSpeech.Options(**options), [], config)
    setting.processor = processor
    return TextToSpeech(setting)


def encoded(task, rows):
    return [task.encode(row)[0].features for row in rows]


@pytest.fixture
def folder(tmp_path):
    return speech_cases.save_speecht5(tmp_path / "m")


@pytest.mark.parametrize("samples", [1600, 1791, 1792, 2047, 2048, 3200])
def test_spectrograms_are_those_of_the_processor_cut_to_whole_steps(samples, folder, tmp_path):
    task = make(folder)
    values = np.random.default_rng(0).normal(size=samples) * 0.1
    path = str(speech_cases.write_wav(tmp_path / "a.wav", values, RATE))
    row = {"text": "ab", "audio": path, "speaker": [1.0] * speech_cases.SPEAKER_SIZE}
    (found,) = task.encode(row)
    processor = hf.SpeechT5Processor.from_pretrained(folder)
    expected = processor(
        text="ab", audio_target=read_sound(path, RATE), sampling_rate=RATE, return_tensors="pt"
    )
    batch = task.collate([found.features])
    frames = expected["labels"].shape[1] // FACTOR * FACTOR
    assert found.supervised == batch["labels"].shape[1] == frames
    assert torch.equal(batch["labels"], expected["labels"][:, :frames])
    ids = expected["input_ids"][0].tolist()
    assert found.features["input_ids"] == ids
    assert batch["attention_mask"].sum() == len(ids)


def test_padding_of_targets_takes_no_part_in_the_loss(folder, tmp_path):
    task = make(folder)
    rows = encoded(task, speech_cases.spoken(tmp_path / "s", 2))
    assert rows[0]["frames"] < rows[1]["frames"]
    batch = task.collate(rows)
    padding = batch["labels"] == -100
    assert padding.sum(1)[:, 0].tolist() == [rows[1]["frames"] - rows[0]["frames"], 0]
    model = speech_cases.tiny_speecht5().eval()

    def outputs(more):
        # More padding; the dropout before the decoder, which is always on, is the same in the frames that both have.
        longer = torch.full((2, more, 8), -100.0)
        labels = torch.cat([batch["labels"], longer], 1)
        with torch.no_grad():
            found = model(**{**batch, "labels": labels})
        return found, task.counted({"labels": labels}, found)[0]

    model.config.speech_decoder_prenet_dropout = 0.0
    model.speecht5.decoder.prenet._consistent_dropout = lambda values, p: values
    (plain, counts), (longer, again) = outputs(0), outputs(6)
    # The convolutions after the decoder see padding at the end of a row: two layers with kernels of 5 reach 4 frames.
    inside = rows[0]["frames"] - 4
    size = plain.spectrogram.abs().max()
    error = (plain.spectrogram - longer.spectrogram[:, : plain.spectrogram.shape[1]])[0, :inside]
    assert error.abs().max() <= 64 * torch.finfo(torch.float32).eps * size
    assert counts[:, 1].tolist() == again[:, 1].tolist() == [8 * row["frames"] for row in rows]
    own = (plain.spectrogram - batch["labels"])[~padding].abs().mean()
    assert task.metrics(counts.numpy(), None)["mel_l1"] == pytest.approx(own.item(), rel=1e-5)


def test_a_run_learns_and_resumes_and_evaluations_repeat(folder, tmp_path, one_thread):
    rows = speech_cases.spoken(tmp_path / "s")
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    values = cases.recipe(
        folder,
        "text_to_speech",
        data,
        tmp_path / "whole",
        strategy="full",
        data={"eval": 0.25},
        training={"max_steps": 60, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 30},
    )
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    cases.run("train", file, out, "training.stop_after=31", code=3)
    cases.run("train", file, out, "resume=true")
    whole, parts = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["metrics"] == parts["metrics"]
    assert whole["problems"] == []
    weights = [(tmp_path / f / "model" / "model.safetensors") for f in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    first, second = (evaluate(tmp_path / "whole", rows[:6]) for _ in range(2))
    assert first == second
    assert "which writes no text" in cases.run("generate", tmp_path / "whole", "ab", code=1)


def test_lora_trains_and_one_speaker_serves_all_rows(folder, tmp_path, one_thread):
    rows = speech_cases.spoken(tmp_path / "s", 8)
    np.save(tmp_path / "voice.npy", np.float32([[0.5, 1.0, 0.5, 0.5]]))
    alone = [{"text": row["text"], "audio": row["audio"]} for row in rows]
    task = {"name": "text_to_speech", "speaker": str(tmp_path / "voice.npy")}
    found = train(cases.recipe(folder, task, alone, tmp_path / "run", data={"eval": alone[:4]}))
    assert found.problems == []
    again = evaluate(tmp_path / "run", alone[:4])
    assert again["mel_l1"] == pytest.approx(found.metrics["eval_mel_l1"], rel=1e-5)
    assert again["loss"] == pytest.approx(found.metrics["eval_loss"], rel=1e-5)


FAULTS = {
    "no speaker": (lambda f: {"speaker": None}, "no column 'speaker'"),
    "another size": (lambda f: {"speaker": [1.0] * 5}, "the model's embeddings of speakers have 4"),
    "zeros": (lambda f: {"speaker": [0.0] * 4}, "or only zeros"),
    "not finite": (lambda f: {"speaker": [1.0, 2.0, 3.0, float("nan")]}, "not finite"),
    "words": (lambda f: {"speaker": ["a"] * 4}, "is neither a list of numbers nor the path"),
    "no file": (lambda f: {"speaker": "/no.npy"}, "the embedding /no.npy does not exist"),
    "no numbers": (lambda f: {"speaker": text_file(f)}, "is no .npy file with numbers"),
    "other letters": (lambda f: {"text": "axé"}, "vocabulary has no 'x', 'é'"),
    "no text": (lambda f: {"text": " "}, "column 'text' is blank"),
    "too short": (lambda f: {"audio": wav(f, 1000)}, "1000 samples, which are too few"),
    "too long": (
        lambda f: {"audio": wav(f, RATE * 2)},
        "126 frames, and the model has positions for 80",
    ),
    "too long a text": (lambda f: {"text": "ab" * 12}, "no label is left"),
    "another rate": (lambda f: {"audio": wav(f, 800, 8000)}, "has 8000 samples a second"),
}


def wav(folder, size, rate=RATE):
    return str(speech_cases.write_wav(folder / "x.wav", np.zeros(size), rate))


def text_file(folder):
    (folder / "x.npy").write_text("no numbers")
    return str(folder / "x.npy")


def test_faulty_rows_are_named_with_their_lines(folder, tmp_path):
    first, second = speech_cases.spoken(tmp_path / "s", 2)
    for number, (change, expected) in enumerate(FAULTS.values()):
        place = tmp_path / str(number)
        place.mkdir()
        data = cases.write_jsonl(place / "d.jsonl", [first, second | change(place)])
        values = cases.recipe(folder, "text_to_speech", data, tmp_path / "run")
        printed = cases.run("train", cases.write_recipe(place / "r.yaml", values), code=1)
        assert "d.jsonl:2: " in printed
        assert expected in printed
    assert not (tmp_path / "run").exists()


def test_other_models_are_refused_with_the_reason(folder, tmp_path):
    rows = speech_cases.spoken(tmp_path / "s", 4)
    settings = make(folder).setting
    settings.config = hf.VitsConfig()
    with pytest.raises(ContractError, match="transformers cannot train VITS"):
        TextToSpeech(settings)
    with pytest.raises(NotImplementedError):
        # The reason is still true.
        hf.VitsModel(
            hf.VitsConfig(hidden_size=8, num_attention_heads=2, ffn_dim=8, num_hidden_layers=1)
        )(torch.tensor([[1]]), labels=torch.zeros(1, 2, 2))
    values = cases.recipe(folder, "text_to_speech", rows, tmp_path / "run", base="bf16")
    with pytest.raises(ContractError, match=r"loaded in torch.bfloat16, .* use base=fp32"):
        train(values)
    with pytest.raises(
        ContractError, match=r"task\.speaker: the embedding /no\.npy does not exist"
    ):
        make(folder, speaker="/no.npy")


def test_a_changed_recording_is_noticed(folder, tmp_path):
    task = make(folder)
    (row,) = speech_cases.spoken(tmp_path / "s", 1)
    features = encoded(task, [row])
    speech_cases.write_wav(tmp_path / "s" / "0.wav", np.zeros(1200), RATE)
    with pytest.raises(ContractError, match="fewer than before training"):
        task.collate(features)
    with pytest.raises(BadRow, match="column 'text'"):
        task.encode({"audio": row["audio"]})
