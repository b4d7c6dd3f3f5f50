"""Speech recognition with CTC: recordings are read exactly, texts fit the vocabulary, padding does not matter, and runs resume."""

import copy
import json

import finetune_cases as cases
import numpy as np
import pairs
import pytest
import speech_cases
import torch
import transformers as hf

from peftkit import ContractError, LoraConfig, accelerate, load_base, wrap
from peftkit.finetune import evaluate, train
from peftkit.finetune.blocks import find_stacks
from peftkit.finetune.first_step import check_first_step
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.scores import edit_distance, error_rate
from peftkit.finetune.tasks.speech_ctc import SpeechCtc, frames_of


def test_error_rates():
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0
    assert error_rate([["a", "b"], []], [["a", "c"], ["d", "e"]]) == 0.75


@pytest.fixture
def task(tmp_path):
    def build(**options):
        folder = speech_cases.save_ctc(tmp_path / f"m{len(list(tmp_path.iterdir()))}")
        processor = hf.AutoProcessor.from_pretrained(folder)
        config = hf.AutoConfig.from_pretrained(folder)
        return SpeechCtc(Setting(processor, 64, SpeechCtc.Options(**options), [], config))

    return build


def test_frames_are_those_of_the_model(task):
    model = speech_cases.tiny_ctc()
    for samples in (9, 10, 20, 21, 199, 200, 201):
        expected = int(model._get_feat_extract_output_lengths(samples))
        assert frames_of(samples, model.config) == max(0, expected)


def test_padding_of_the_batch_does_not_change_the_text(task, tmp_path):
    one = task()
    rows = [one.encode(row)[0].features for row in speech_cases.speech(tmp_path / "s", 2)]
    assert [r["samples"] for r in rows] == [100, 200]
    frames = [frames_of(r["samples"], one.config) for r in rows]
    names = one.characters.get_vocab()
    found = np.full((2, frames[1] + 3), names["d"])
    found[0, : frames[0]] = [names["a"]] * 3 + [0] * (frames[0] - 3)
    found[1, : frames[1]] = [names["b"]] * 2 + [0] + [names["a"]] * (frames[1] - 3)
    assert one.scores(rows, found, None) == {"wer": 0.0, "cer": 0.0}
    found[1, : frames[1]] = 0
    assert one.scores(rows, found, None) == {"wer": 0.5, "cer": 2 / 3}


def test_texts_can_be_changed_to_fit_the_vocabulary(task, tmp_path):
    (row,) = speech_cases.speech(tmp_path / "s", 1)
    one = task(case="lower", remove="?!")
    ids = one.encode({**row, "text": "A?!"})[0].features["labels"]
    assert ids == [one.characters.get_vocab()["a"]]


FAULTS = {
    "another rate": (lambda f: {"audio": wav(f, rate=500)}, "has 500 samples a second, but the"),
    "no file": (lambda f: {"audio": "/no.wav"}, "the recording /no.wav does not exist"),
    "no path": (lambda f: {"audio": 3}, "column 'audio' is 3, not the path of a recording"),
    "no WAV": (lambda f: {"audio": text_file(f)}, "is no recording that soundfile can read"),
    "empty": (lambda f: {"audio": wav(f, size=0)}, "is empty"),
    "too long": (lambda f: {"audio": wav(f, size=31000)}, "31.0 s, more than task.max_seconds=30"),
    "too short": (
        lambda f: {"audio": wav(f, size=50), "text": "aaa"},
        "as 4 frames, but the text 'aaa' and the masks of training need 5",
    ),
    "other letters": (
        lambda f: {"text": "aXé b"},
        "the model's vocabulary has no 'X', 'é'; set task.case, or task.remove",
    ),
    "no text": (lambda f: {"text": ""}, "column 'text' is empty"),
}


def wav(folder, size=100, rate=speech_cases.RATE):
    return str(speech_cases.write_wav(folder / "x.wav", np.zeros(size), rate=rate))


def text_file(folder):
    (folder / "x.wav").write_text("no sound")
    return str(folder / "x.wav")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_with_its_line(fault, tmp_path, one_thread):
    make, expected = FAULTS[fault]
    model = speech_cases.save_ctc(tmp_path / "m")
    first, second = speech_cases.speech(tmp_path / "s", 2)
    data = cases.write_jsonl(tmp_path / "d.jsonl", [first, second | make(tmp_path)])
    values = cases.recipe(model, "speech_ctc", data, tmp_path / "run")
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values), code=1)
    assert "d.jsonl:2: " in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


def test_models_without_speech_are_refused(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    with pytest.raises(ContractError, match="but speech needs a feature extractor"):
        train(cases.recipe(model, "speech_ctc", [{"audio": "a", "text": "b"}], tmp_path / "run"))


def test_a_run_learns_and_resumes(tmp_path, one_thread):
    # With masks of time steps, which are drawn from numpy's random state.
    model = speech_cases.save_ctc(tmp_path / "m", mask_time_prob=0.1, mask_time_length=2)
    data = cases.write_jsonl(tmp_path / "d.jsonl", speech_cases.speech(tmp_path / "s"))
    values = cases.recipe(
        model,
        "speech_ctc",
        data,
        tmp_path / "whole",
        strategy="full",
        data={"eval": 0.25},
        training={
            "max_steps": 200,
            "batch_size": 8,
            "lr": 3e-3,
            "checkpoint_every": 100,
            "best_metric": "cer",
        },
    )
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    cases.run("train", file, out, "training.stop_after=101", code=3)
    cases.run("train", file, out, "resume=true")
    whole, parts = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["metrics"] == parts["metrics"]
    weights = [(tmp_path / f / "model" / "model.safetensors") for f in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # The checkpoint with the smallest error rate is kept.
    lines = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    rates = [line["eval_cer"] for line in lines if "eval_cer" in line]
    assert whole["metrics"]["eval_cer"] == min(rates) < max(rates)
    assert evaluate(tmp_path / "whole", data)["cer"] <= 0.2


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_loss_and_gradients_are_those_of_plain_peft(kind, task, tmp_path, one_thread):
    plain = pairs.adapted(speech_cases.tiny_ctc(kind))
    fused = accelerate(copy.deepcopy(plain))
    truth = pairs.in_float64(plain)
    one = task()
    rows = [one.encode(row)[0].features for row in speech_cases.speech(tmp_path / "s", 16)]
    runs = []
    for start in range(0, 16, 4):
        batch = one.collate(rows[start : start + 4])
        exact = batch | {"input_values": batch["input_values"].double()}
        runs.append((pairs.step(fused, batch), pairs.step(plain, batch), pairs.step(truth, exact)))
    pairs.assert_near_enough(runs)


PARTIAL = {"name": "partial", "last_blocks": 1}
VALUES = {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("strategy", [PARTIAL, "gradual"], ids=["partial", "gradual"])
def test_the_weight_norm_of_the_convolution_is_no_stack_of_blocks(strategy, tmp_path, one_thread):
    model = speech_cases.save_ctc(tmp_path / "m")
    names = [stack.name for stack in find_stacks(speech_cases.tiny_ctc())]
    assert names == ["wav2vec2.feature_extractor.conv_layers", "wav2vec2.encoder.layers"]
    rows = cases.write_jsonl(tmp_path / "d.jsonl", speech_cases.speech(tmp_path / "s"))
    found = train(cases.recipe(model, "speech_ctc", rows, tmp_path / "run", strategy=strategy))
    assert (found.status, found.problems) == ("finished", [])


@pytest.mark.parametrize("strategy", [VALUES, "bottleneck", "prefix"], ids=str)
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_an_output_of_a_quantised_layer_may_be_changed_in_place(
    base, strategy, tmp_path, one_thread
):
    """Wav2Vec2 sets the padding to zero in the output of its projection, which bitsandbytes makes a view."""
    folder = speech_cases.save_ctc(tmp_path / "m")
    rows = cases.write_jsonl(tmp_path / "d.jsonl", speech_cases.speech(tmp_path / "s"))
    options = {"strategy": strategy, "base": base, "data": {"eval": 0.25}}
    found = train(cases.recipe(folder, "speech_ctc", rows, tmp_path / "run", **options))
    assert (found.status, found.problems) == ("finished", [])
    assert evaluate(tmp_path / "run")["loss"] == found.metrics["eval_loss"]


def test_gradients_after_a_change_in_place_are_those_of_a_copy(task, tmp_path, one_thread):
    folder = speech_cases.save_ctc(tmp_path / "m")
    one = task()
    rows = [one.encode(row)[0].features for row in speech_cases.speech(tmp_path / "s", 4)]
    batch = one.collate(rows)
    found = []
    for copied in (True, False):
        torch.manual_seed(0)
        model = wrap(
            load_base(folder, "nf4", auto_class="AutoModelForCTC"),
            LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        if copied:
            layer = model.get_submodule("base_model.model.wav2vec2.feature_projection.projection")
            layer.register_forward_hook(lambda module, args, output: output.clone())
        check_first_step(model.train(), batch, True, None)
        loss = model(**batch).loss
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(grad.any() for grad in found[0])
    assert all(torch.equal(*grads) for grads in zip(*found, strict=True))
