"""Two processes on the CPU train as one process does with the same batches, and an error in one of them ends both."""

import json
import subprocess
import sys

import distill_cases
import finetune_cases as cases
import pytest
import torch
from finetune_processes import torchrun
from markers import slow_if
from process_cases import (
    WHOLE_BATCHES,
    as_process,
    assert_trained_alike,
    files,
    largest,
    losses,
    run_three,
    weights,
    write_recipe,
)

from peftkit.errors import ContractError
from peftkit.finetune import read_recipe
from peftkit.finetune.parallel_limits import require_parallel
from peftkit.finetune.tasks.contrastive_images import ContrastiveImages
from peftkit.finetune.trainer import total_steps

STRATEGIES = {
    "lora on NF4": {"strategy": {"name": "lora", "r": 4}, "base": "nf4"},
    "full": {"strategy": "full"},
    "gradual": {"strategy": {"name": "gradual", "stage_steps": 2}},
    "packed rows": {"task": {"name": "sft", "packing": True}, "training": {"seq_len": 24}},
    "mix": {"strategy": {"name": "mix", "lora": {"r": 2}, "bottleneck": {}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def test_two_processes_train_as_one(model, tmp_path, one_thread):
    file = write_recipe(model, tmp_path)
    counts = tmp_path / "counts.json"
    printed = run_three(file, tmp_path, counts=counts)
    assert printed.count("finished: ") == printed.count("step 6/6: loss") == 1
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert "2 x 1 in each of 2 processes" in (tmp_path / "parts" / "report.md").read_text()
    ran = json.loads(counts.read_text())
    assert ran["loss"] >= 6
    assert ran["stock"] == 0
    printed = cases.run(
        "train", file, "training.batch_size=2", f"out={tmp_path / 'parts'}", "resume=true", code=1
    )
    assert "was started with 2, so its batches had another size" in printed


def test_an_error_in_one_process_ends_all_with_one_message(model, tmp_path):
    file = write_recipe(model, tmp_path)
    printed = torchrun("train", file, code=1, error=3)
    assert printed.count("ContractError: the second process has failed") == 1
    assert "step 2/6" in printed
    assert "step 3/6" not in printed
    assert "finished: " not in printed


@pytest.mark.parametrize("name", slow_if("embeddings".__ne__, WHOLE_BATCHES))
def test_the_loss_of_a_batch_is_that_of_all_processes(name, tmp_path, one_thread, monkeypatch):
    save, rows, changes = WHOLE_BATCHES[name]
    model = save(tmp_path / "m")
    # Random views depend on the rows of a process.
    monkeypatch.setattr(ContrastiveImages, "_view", lambda self, image, draws: image)
    training = {"eval_batch_size": 4, "lr": 0.03} | changes.get("training", {})
    changes = changes | {"rows": rows(tmp_path), "training": training}
    file = write_recipe(model, tmp_path, **changes)
    cases.run("train", file)
    half = "training.batch_size=2", "training.eval_batch_size=2"
    cases.run("train", file, *half, f"out={tmp_path / 'half'}")
    torchrun("train", file, *half, f"out={tmp_path / 'parts'}", plain_views=True)
    whole, parts, part = (tmp_path / run for run in ("whole", "parts", "half"))
    other = largest(weights(whole), weights(part))
    assert largest(weights(whole), weights(parts)) < 1e-3 * other
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=1e-6)
    wanted, found = (
        json.loads((run / "result.json").read_text())["metrics"] for run in (whole, parts)
    )
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_stages_and_preferences_train_in_two_processes(model, tmp_path, one_thread):
    rows = [
        {"prompt": "say a", "chosen": c * 3, "rejected": c.upper()}
        for c in "abcdefghijklmnopqrst" * 2
    ]
    choices = cases.write_jsonl(tmp_path / "c.jsonl", rows)
    stages = [
        {"task": "sft"},
        {"task": "preference", "data": {"train": str(choices), "eval": 0.2}, "carry": "merge"},
    ]
    values = json.loads(write_recipe(model, tmp_path).read_text())
    values = {name: value for name, value in values.items() if name != "task"} | {"stages": stages}
    file = cases.write_recipe(tmp_path / "s.yaml", values)
    half = "training.batch_size=2", "training.eval_batch_size=4"
    cases.run("train", file)
    for rows in (1, 2):
        split = f"training.batch_size={rows}", f"training.gradient_accumulation={4 // rows}"
        cases.run("train", file, *split, half[1], f"out={tmp_path / f'split-{rows}'}")
    torchrun("train", file, half[0], "training.eval_batch_size=2", f"out={tmp_path / 'parts'}")
    for stage in ("1-sft", "2-preference"):
        splits = [tmp_path / f"split-{rows}" / stage for rows in (1, 2)]
        assert_trained_alike(tmp_path / "whole" / stage, splits, tmp_path / "parts" / stage)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_in_two_processes_as_in_one(name, model, tmp_path, one_thread):
    run_three(write_recipe(model, tmp_path, **STRATEGIES[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["logits", "hidden"])
def test_a_student_learns_in_two_processes_as_in_one(loss, model, tmp_path, one_thread):
    teacher = tmp_path / "teacher"
    if loss == "logits":
        distill_cases.save_teacher(teacher)
    else:
        distill_cases.save_deeper(teacher)
    distill = {"teacher": str(teacher), "weight": 0.7, "loss": loss}
    file = write_recipe(model, tmp_path, distill=distill)
    run_three(file, tmp_path)
    whole, split, parts = (
        torch.tensor(taught(tmp_path / name)) for name in ("whole", "split-1", "parts")
    )
    assert len(whole) == 12
    allowed = 2 * (whole - split).abs().max() + torch.finfo(torch.float32).eps * whole.abs().max()
    assert (whole - parts).abs().max() <= allowed


def taught(folder):
    """Both parts of the loss in each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [v for line in lines for n, v in line.items() if n in ("label_loss", "teacher_loss")]


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_resumes(model, tmp_path):
    dropout = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    file = write_recipe(model, tmp_path, strategy=dropout)
    torchrun("train", file)
    parts = f"out={tmp_path / 'parts'}"
    printed = torchrun("train", file, parts, code=1, kill=5)
    assert "finished: " not in printed
    assert "resuming from checkpoint-3" in torchrun("train", file, parts, "resume=true")
    assert largest(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


@pytest.mark.slow
def test_faults_are_printed_once(model, tmp_path):
    file = write_recipe(model, tmp_path)
    printed = torchrun("train", file, "training.lrr=1", code=1)
    assert printed.count("error: training.lrr=1: there is no such key") == 1
    assert not (tmp_path / "whole").exists()
    faulty = "training.lr=1e30", "training.max_grad_norm=1e30", "training.optimizer=sgd"
    printed = torchrun("train", file, *faulty, code=1)
    assert printed.count("error: the loss is") == 1
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["status"] == "failed"


def test_what_cannot_be_divided_is_refused(model, tmp_path, monkeypatch):
    recipe = read_recipe(write_recipe(model, tmp_path))
    as_process(monkeypatch, 4)
    require_parallel(recipe)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ContractError, match="does not work with accelerate's FSDP; start it with torchrun"
    ):
        require_parallel(recipe)


def test_steps_are_counted_over_all_processes(model, tmp_path, monkeypatch):
    file = write_recipe(model, tmp_path, training={"max_steps": None, "epochs": 2})
    recipe = read_recipe(file)
    assert total_steps(recipe, 32) == (16, 8)
    as_process(monkeypatch, 2)
    assert total_steps(recipe, 32) == (8, 4)
    assert total_steps(recipe, 33) == (10, 5)


def test_the_command_is_a_module_for_launchers(tmp_path):
    """Folders of runs in the working folder are no packages, though one is called as a package that pandas uses if it is installed."""
    (tmp_path / "bottleneck").mkdir()
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("raise SystemExit('this is no package')")
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "Usage: peftkit train" in done.stdout
