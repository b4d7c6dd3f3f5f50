"""Speech recognition with an encoder-decoder: labels are those of transformers' recipe, runs learn and resume, bad rows are named."""

import copy
import json

import finetune_cases as cases
import numpy as np
import pairs
import pytest
import speech_cases
import torch
import transformers as hf
from safetensors.torch import load_file

from peftkit import ContractError, accelerate
from peftkit.finetune import evaluate, generate, train
from peftkit.finetune.sound import read_sound
from peftkit.finetune.tasks.base import BadRow, Setting
from peftkit.finetune.tasks.speech_seq2seq import LEAST_SAMPLES, SpeechSeq2Seq

RATE, NOISE = 16000, 0.05
ENGLISH = {"name": "speech_seq2seq", "language": "english"}


def make(folder, seq_len=24, **options):
    processor = hf.AutoProcessor.from_pretrained(folder)
    config = hf.AutoConfig.from_pretrained(folder)
    setting = Setting(processor.tokenizer, seq_len, SpeechSeq2Seq.Options(**options), [], config)
    setting.processor = processor
    return SpeechSeq2Seq(setting)


def encoded(task, rows):
    return [task.encode(row)[0].features for row in rows]


def recipe_of_transformers(processor, rows):
    """The batch as in transformers' own recipe for Whisper: padding is -100, and the token that starts the decoder is cut off."""
    features = [{"input_ids": processor.tokenizer(row["text"]).input_ids} for row in rows]
    padded = processor.tokenizer.pad(features, return_tensors="pt")
    labels = padded["input_ids"].masked_fill(padded.attention_mask.ne(1), -100)
    assert (
        labels[:, 0] == processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    ).all()
    sounds = [read_sound(row["audio"], RATE) for row in rows]
    inputs = processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt")
    return {"input_features": inputs.input_features, "labels": labels[:, 1:]}


@pytest.mark.parametrize(
    ("language", "task"), [("german", "translate"), ("EN", "transcribe"), (None, None)]
)
def test_batches_are_those_of_the_recipe_of_transformers(language, task, tmp_path):
    folder = speech_cases.save_whisper(tmp_path / "m", language)
    options = {} if language is None else {"language": language, "task": task}
    ours = make(folder, **options)
    rows = speech_cases.speech(tmp_path / "s", 5, RATE)
    expected = recipe_of_transformers(hf.WhisperProcessor.from_pretrained(folder, **options), rows)
    found = ours.collate(encoded(ours, rows))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # What is saved with the weights makes the same labels without arguments.
    ours.setting.processor.save_pretrained(tmp_path / "again")
    again = hf.WhisperProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(recipe_of_transformers(again, rows)["labels"], expected["labels"])


@pytest.mark.parametrize("apply", [True, False])
def test_masks_of_training_leave_padding_out(apply, tmp_path):
    folder = speech_cases.save_whisper(tmp_path / "m", apply_spec_augment=apply)
    task = make(folder, language="english")
    batch = task.collate(encoded(task, speech_cases.speech(tmp_path / "s", 2, RATE)))
    # 0.1 s and 0.2 s, one frame each 0.01 s
    assert not apply or batch["attention_mask"].sum(1).tolist() == [10, 20]
    assert ("attention_mask" in batch) is apply


def test_a_long_text_is_cut_and_compared_as_a_whole(tmp_path):
    task = make(speech_cases.save_whisper(tmp_path / "m"), seq_len=8, language="english")
    (row,) = speech_cases.speech(tmp_path / "s", 1, RATE)
    (found,) = task.encode({**row, "text": "abcdefgh"})
    assert (found.length, found.supervised, len(found.features["labels"])) == (12, 8, 8)
    ends = task.setting.tokenizer.eos_token_id
    # The end that was cut off is not a label in another place.
    assert ends not in found.features["labels"]
    written = np.array([task.setting.tokenizer("abcd").input_ids])
    assert task.scores({"text": [found.features["text"]]}, written, None)["cer"] == 0.5


def test_whisper_writes_as_with_the_arguments_of_generate(tmp_path):
    folder = speech_cases.save_whisper(tmp_path / "m")
    task = make(folder, language="german", task="translate")
    rows = speech_cases.speech(tmp_path / "s", 3, RATE)
    batch = task.collate(encoded(task, rows))
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    features = batch["input_features"]
    expected = model.generate(features, language="german", task="translate", max_new_tokens=20)
    english = model.generate(features, language="english", max_new_tokens=20)
    assert not torch.equal(expected, english)
    task.fit_model(model)
    assert torch.equal(task.written(model, batch), expected)
    # A saved model needs no arguments.
    model.save_pretrained(tmp_path / "again")
    again = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(features, max_new_tokens=20), expected)


@pytest.mark.parametrize("kind", ["whisper", "moonshine", "speech_to_text"])
def test_loss_and_gradients_are_those_of_plain_peft(kind, tmp_path, one_thread):
    folder = getattr(speech_cases, f"save_{kind}")(tmp_path / "m")
    task = make(folder, **({"language": "english"} if kind == "whisper" else {}))
    # Speech2Text divides by the variation of the spectra in time, and a tone alone has none.
    rows = encoded(task, speech_cases.speech(tmp_path / "s", 8, RATE, NOISE))
    cls = hf.AutoModelForSpeechSeq2Seq.from_pretrained(folder, pad_token_id=0)
    plain = pairs.adapted(cls)
    fused, truth = accelerate(copy.deepcopy(plain)), pairs.in_float64(plain)
    runs = []
    for start in range(0, 8, 2):
        batch = task.collate(rows[start : start + 2])
        exact = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
        runs.append((pairs.step(fused, batch), pairs.step(plain, batch), pairs.step(truth, exact)))
    pairs.assert_near_enough(runs)


def test_a_run_learns_and_resumes(tmp_path, one_thread):
    # With masks of time steps, which are drawn from numpy's random state.
    model = speech_cases.save_whisper(
        tmp_path / "m", apply_spec_augment=True, mask_time_prob=0.02, mask_time_length=2
    )
    rows = speech_cases.speech(tmp_path / "s", 32, RATE)
    data, heard = (cases.write_jsonl(tmp_path / name, rows) for name in ("d.jsonl", "e.jsonl"))
    values = cases.recipe(
        model,
        ENGLISH,
        data,
        tmp_path / "whole",
        strategy="full",
        data={"eval": str(heard)},
        training={
            "max_steps": 100,
            "batch_size": 8,
            "lr": 3e-3,
            "checkpoint_every": 50,
            "best_metric": "cer",
            "samples": 1,
        },
    )
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    cases.run("train", file, out, "training.stop_after=51", code=3)
    cases.run("train", file, out, "resume=true")
    whole, parts = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["metrics"] == parts["metrics"]
    assert whole["problems"] == []
    weights = [(tmp_path / f / "model" / "model.safetensors") for f in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert whole["metrics"]["eval_cer"] <= 0.2
    # The positions of the encoder are a fixed function.
    before, after = load_file(model / "model.safetensors"), load_file(weights[0])
    fixed = "model.encoder.embed_positions.weight"
    assert [n for n, value in before.items() if torch.equal(value, after[n])] == [fixed]
    (sample,) = json.loads((tmp_path / "whole" / "samples.json").read_text())
    assert sample["prompt"] == str(tmp_path / "s" / "0.wav")
    assert sample["expected"] == "a"
    sounds = [str(tmp_path / "s" / f"{i}.wav") for i in (0, 5)]
    printed = cases.run(
        "generate", tmp_path / "whole", "--audio", sounds[0], "--audio", sounds[1], "--json"
    )
    answers = json.loads(printed)
    assert [answer["audio"] for answer in answers] == sounds
    assert answers[0]["answer"] == sample["after"] != sample["before"]
    assert answers[0]["answer"] != answers[1]["answer"]


STRATEGIES = {
    "lora in bf16": {"base": "bf16"},
    "bottleneck": {"strategy": {"name": "bottleneck", "reduction_factor": 4}},
    "prefix": {"strategy": "prefix"},
    "gradual": {"strategy": {"name": "gradual", "stage_steps": 1}},
    "checkpointing": {"training": {"gradient_checkpointing": True, "gradient_accumulation": 2}},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_whisper_trains_with_every_strategy(name, tmp_path, one_thread):
    model = speech_cases.save_whisper(tmp_path / "m")
    rows = speech_cases.speech(tmp_path / "s", 8, RATE)
    changes = {"data": {"eval": rows[:3]}, **STRATEGIES[name]}
    found = train(cases.recipe(model, ENGLISH, rows, tmp_path / "run", **changes))
    assert found.problems == []
    again = evaluate(tmp_path / "run", rows[:3])
    assert again["cer"] == found.metrics["eval_cer"]
    assert len(generate(tmp_path / "run", audio=[rows[0]["audio"]])) == 1


@pytest.mark.parametrize("kind", ["moonshine", "speech_to_text"])
def test_other_kinds_train(kind, tmp_path, one_thread):
    model = getattr(speech_cases, f"save_{kind}")(tmp_path / "m")
    rows = speech_cases.speech(tmp_path / "s", 8, RATE, NOISE)
    found = train(
        cases.recipe(model, "speech_seq2seq", rows, tmp_path / "run", data={"eval": rows[:3]})
    )
    assert found.problems == []
    assert evaluate(tmp_path / "run", rows[:3])["cer"] == found.metrics["eval_cer"]
    assert len(generate(tmp_path / "run", audio=[rows[0]["audio"]])) == 1


@pytest.mark.parametrize("kind", ["moonshine", "speech_to_text"])
def test_a_recording_of_the_shortest_length_can_be_used(kind, tmp_path):
    shortest = LEAST_SAMPLES[kind]
    folder = getattr(speech_cases, f"save_{kind}")(tmp_path / "m")
    model = hf.AutoModelForSpeechSeq2Seq.from_pretrained(folder, pad_token_id=0)
    task = make(folder)
    for size in (shortest, shortest - 1):
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, size)
        speech_cases.write_wav(tmp_path / f"{size}.wav", noise, RATE)
    rows = encoded(task, [{"audio": str(tmp_path / f"{shortest}.wav"), "text": "a"}])
    assert bool(torch.isfinite(model(**task.collate(rows)).loss))
    with pytest.raises(BadRow, match=f"has {shortest - 1} samples, and the model needs"):
        task.encode({"audio": str(tmp_path / f"{shortest - 1}.wav"), "text": "a"})


def test_moonshine_hears_nothing_of_a_shorter_recording():
    model, shortest = speech_cases.tiny_moonshine(8), LEAST_SAMPLES["moonshine"]
    lengths = [model._get_feat_extract_output_lengths(n) for n in (shortest - 1, shortest)]
    assert [int(length) for length in lengths] == [0, 1]


FAULTS = {
    "another rate": (lambda f: {"audio": wav(f, rate=8000)}, "has 8000 samples a second, but the"),
    "longer than the window": (
        lambda f: {"audio": wav(f, size=RATE + 1)},
        "1.0 s, but the model hears 1 s at a time; split it with its text",
    ),
    "too long": (lambda f: {"audio": wav(f, size=31 * RATE)}, "more than task.max_seconds=30"),
    "no text": (lambda f: {"text": ""}, "column 'text' is empty"),
    "nothing left": (lambda f: {"text": "?"}, "no character is left of the text"),
    "a token of Whisper": (
        lambda f: {"text": "a<|de|>b"},
        "the text has the special tokens '<|de|>'",
    ),
}


def wav(folder, size=1600, rate=RATE):
    return str(speech_cases.write_wav(folder / "x.wav", np.zeros(size), rate=rate))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_with_its_line(fault, tmp_path):
    change, expected = FAULTS[fault]
    model = speech_cases.save_whisper(tmp_path / "m")
    first, second = speech_cases.speech(tmp_path / "s", 2, RATE)
    data = cases.write_jsonl(tmp_path / "d.jsonl", [first, second | change(tmp_path)])
    values = cases.recipe(model, ENGLISH | {"remove": "?"}, data, tmp_path / "run")
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values), code=1)
    assert "d.jsonl:2: " in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


MISFITS = {
    "no language": ("english", {}, "the model is multilingual"),
    "a language of an English model": (None, {"language": "de"}, "is for English alone"),
    "a task without a language": (None, {"task": "translate"}, "needs the language"),
    "no such language": ("english", {"language": "klingon"}, "chinese, english, german, mandarin"),
    "a language without a token": ("english", {"language": "spanish"}, "it has chinese, english"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_languages_must_fit_the_model(misfit, tmp_path):
    language, options, expected = MISFITS[misfit]
    model = speech_cases.save_whisper(tmp_path / "m", language)
    rows = speech_cases.speech(tmp_path / "s", 4, RATE)
    task = {"name": "speech_seq2seq", **options}
    with pytest.raises(ContractError, match=expected):
        train(cases.recipe(model, task, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_tokens_of_languages_in_another_order_are_refused(tmp_path):
    folder = speech_cases.save_whisper(tmp_path / "m")
    file = folder / "tokenizer.json"
    text = file.read_text()
    assert text.count("<|zh|>") == 1
    file.write_text(text.replace("<|zh|>", "<|es|>"))
    with pytest.raises(ContractError, match="are not in Whisper's order"):
        make(folder, language="spanish")


def test_other_models_and_uses_are_refused(tmp_path, one_thread):
    rows = speech_cases.speech(tmp_path / "s", 8, RATE)
    ctc = speech_cases.save_ctc(tmp_path / "ctc")
    with pytest.raises(ContractError, match="this one is a wav2vec2; for models with a CTC head"):
        train(cases.recipe(ctc, "speech_seq2seq", rows, tmp_path / "run"))
    moonshine = speech_cases.save_moonshine(tmp_path / "moonshine")
    with pytest.raises(ContractError, match="are for Whisper, and this is a moonshine"):
        train(cases.recipe(moonshine, ENGLISH, rows, tmp_path / "run"))
    whisper = speech_cases.save_whisper(tmp_path / "m")
    noisy = whisper / "processor_config.json"
    settings = json.loads(noisy.read_text())
    settings["feature_extractor"]["dither"] = 0.1
    noisy.write_text(json.dumps(settings))
    with pytest.raises(ContractError, match=r"adds noise \(dither=0.1\)"):
        make(whisper, language="english")
    values = cases.recipe(moonshine, "speech_seq2seq", rows, tmp_path / "run")
    values["training"]["label_smoothing"] = 0.1
    with pytest.raises(ContractError, match="has no effect on the loss of task speech_seq2seq"):
        train(values)
    del values["training"]["label_smoothing"]
    train(values)
    with pytest.raises(ContractError, match="answers recordings, not prompts"):
        generate(tmp_path / "run", ["a"])
    with pytest.raises(ContractError, match=r"the recording /no\.wav does not exist"):
        generate(tmp_path / "run", audio=["/no.wav"])
