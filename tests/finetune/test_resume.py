"""A run that was stopped and resumed ends with the same weights, bit for bit, as one that was not."""

import json
import shutil
import signal

import finetune_cases as cases
import pytest
from safetensors.torch import load_file

import peftkit.finetune.trainer as trainer_module
from peftkit.finetune import train

STRATEGIES = {
    "lora with dropout": ("lora", {"name": "lora", "r": 4, "lora_dropout": 0.2}),
    "full": ("full", "full"),
    "gradual": ("gradual", {"name": "gradual", "stage_steps": 2}),
    "mix": ("mix", {"name": "mix", "lora": {"r": 2}, "prefix": {}}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def values(model, tmp_path, out, strategy="lora", **training):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(20))
    settings = {"max_steps": 8, "checkpoint_every": 3, "samples": 0, "gradient_accumulation": 2}
    return cases.recipe(
        model,
        "sft",
        data,
        tmp_path / out,
        strategy=strategy,
        data={"eval": 0.2},
        training={**settings, "batch_size": 2, **training},
    )


def weights(folder):
    (file,) = folder.glob("*/*model.safetensors")
    return load_file(file)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, model, tmp_path, one_thread):
    _, strategy = STRATEGIES[name]
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "whole", strategy))
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    printed = cases.run("train", file, out, "training.stop_after=4", code=3)
    assert "stopped after step 4" in printed
    assert not list((tmp_path / "parts").glob("*/*model.safetensors"))
    assert "is not finished (stopped)" in cases.run("generate", tmp_path / "parts", "x", code=1)
    assert "resuming from checkpoint-4" in cases.run("train", file, out, "resume=true")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert "is finished" in cases.run("train", file, out, "resume=true", code=1)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_resumed_run_may_have_other_samples(samples, model, tmp_path, one_thread):
    recipe = values(model, tmp_path, "run", samples=2, sample_tokens=4, stop_after=4)
    assert train(recipe).status == "stopped"
    recipe["training"] |= {"samples": samples, "stop_after": None}
    assert train(recipe | {"resume": True}).status == "finished"
    found = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert [sorted(sample) for sample in found] == [
        ["after", "before", "expected", "prompt"]
    ] * samples


def test_a_run_that_died_resumes_from_the_last_whole_checkpoint(
    model, tmp_path, one_thread, monkeypatch
):
    strategy = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "whole", strategy))
    cases.run("train", file)
    step = trainer_module.RecipeTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise MemoryError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", dies)
    with pytest.raises(MemoryError):
        train(values(model, tmp_path, "parts", strategy))
    monkeypatch.undo()
    parts = tmp_path / "parts"
    # The newest checkpoint was cut off while it was written.
    broken = parts / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:100])
    printed = cases.run("train", file, f"out={parts}", "resume=true")
    assert "ignoring incomplete or damaged checkpoints: checkpoint-6" in printed
    assert "resuming from checkpoint-3" in printed
    assert_equal(weights(tmp_path / "whole"), weights(parts))
    assert metrics(tmp_path / "whole") == metrics(parts)


@pytest.mark.parametrize("ending", ["the last step", "early stopping"])
def test_a_run_that_died_after_its_last_step_is_finished_without_another(
    ending, model, tmp_path, one_thread, monkeypatch
):
    early = {
        "early_stopping": 1,
        "lr": 0.5,
        "max_steps": 20,
        "checkpoint_every": 2,
        "scheduler": "constant",
    }
    settings = early if ending == "early stopping" else {"checkpoint_every": 4}
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "whole", **settings))
    cases.run("train", file)

    def dies(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("peftkit.finetune.outcome.judge", dies)
    parts = tmp_path / "parts"
    with pytest.raises(MemoryError):
        train(values(model, tmp_path, "parts", **settings))
    monkeypatch.undo()
    cases.run("train", file, f"out={parts}", "resume=true")
    assert_equal(weights(tmp_path / "whole"), weights(parts))
    results = [
        json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "whole", parts)
    ]
    assert results[0]["steps"] == results[1]["steps"]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_ctrl_c_saves_a_checkpoint(model, tmp_path, one_thread, monkeypatch):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "whole"))
    cases.run("train", file)
    before = signal.getsignal(signal.SIGINT)
    step = trainer_module.RecipeTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", interrupted)
    parts = tmp_path / "parts"
    # The second micro-batch of the step raises the signal again, which would be KeyboardInterrupt after the first.
    one = values(model, tmp_path, "parts", gradient_accumulation=1, batch_size=4)
    whole = values(model, tmp_path, "whole1", gradient_accumulation=1, batch_size=4)
    assert train(one).status == "stopped"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert (parts / "checkpoints" / "checkpoint-5" / "whole.json").exists()
    train(one | {"resume": True})
    train(whole)
    assert_equal(weights(tmp_path / "whole1"), weights(parts))


def test_another_recipe_or_other_data_cannot_resume(model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "run"))
    cases.run("train", file, "training.stop_after=3", code=3)
    printed = cases.run("train", file, "resume=true", "training.lr=1e-4", "strategy.r=8", code=1)
    assert "strategy.r: 16 before, 8 now" in printed
    assert "training.lr: 0.01 before, 0.0001 now" in printed
    assert "already has a run; continue it with resume=true" in cases.run("train", file, code=1)
    cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(21))
    printed = cases.run("train", file, "resume=true", code=1)
    assert "the training rows are not those with which the run" in printed


def test_a_run_without_a_checkpoint_starts_again(model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, "run"))
    cases.run("train", file, f"out={tmp_path / 'whole'}")
    cases.run("train", file, "training.stop_after=3", code=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "no whole checkpoint; starting again" in cases.run("train", file, "resume=true")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
