"""Checkpoints: an old one goes after a newer one is complete, damage is found, a full disk loses nothing, one process at a time."""

import errno
import json
import resource
import shutil
import subprocess
import sys

import finetune_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit import ContractError
from peftkit.finetune import saving, train
from peftkit.finetune.checkpoints import (
    checkpoints_in,
    is_whole,
    mark_whole,
    remove,
    remove_old,
)
from peftkit.finetune.run_lock import RunLock
from peftkit.finetune.trainer import RecipeTrainer
from peftkit.finetune.training import SingleRun


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def values(model, tmp_path, out="run", **training):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    settings = {"max_steps": 6, "checkpoint_every": 2, "samples": 0, "batch_size": 2, **training}
    return cases.recipe(model, "sft", data, tmp_path / out, data={"eval": 0.25}, training=settings)


def names(folder):
    return [checkpoint.name for checkpoint in checkpoints_in(folder)]


def made(folder, step, best=None, whole=True):
    """A small checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    (checkpoint / "weights").write_bytes(bytes(100))
    if whole:
        mark_whole(checkpoint)
    return checkpoint


def test_recent_checkpoints_and_their_best_are_kept(tmp_path):
    for step, best in ((2, 2), (4, 4), (8, 4), (10, 4), (12, 12)):
        made(tmp_path, step, best)
    made(tmp_path, 6, whole=False)
    made(tmp_path, 14, whole=False)
    remove_old(tmp_path, 2)
    # The best one of 10 is kept for a run that has to go on from there. 14 is being written.
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (4, 10, 12, 14)]
    remove_old(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-14"]


def test_without_a_complete_checkpoint_none_is_removed(tmp_path):
    made(tmp_path, 2, whole=False)
    made(tmp_path, 4, whole=False)
    remove_old(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_damage_is_found(tmp_path):
    checkpoint = made(tmp_path, 2)
    assert is_whole(checkpoint, read=True)
    (checkpoint / "weights").write_bytes(bytes(99) + b"x")
    assert is_whole(checkpoint)
    assert not is_whole(checkpoint, read=True)
    (checkpoint / "weights").write_bytes(bytes(99))
    assert not is_whole(checkpoint)
    (checkpoint / "weights").unlink()
    assert not is_whole(checkpoint)


def test_a_checkpoint_that_is_partly_removed_does_not_count(tmp_path, monkeypatch):
    checkpoint = made(tmp_path, 2)

    def dies(folder):
        raise MemoryError

    monkeypatch.setattr("peftkit.finetune.checkpoints.shutil.rmtree", dies)
    with pytest.raises(MemoryError):
        remove(checkpoint)
    assert (checkpoint / "weights").exists()
    assert not is_whole(checkpoint)


def test_an_old_checkpoint_is_removed_after_the_new_one_is_complete(
    model, tmp_path, one_thread, monkeypatch
):
    folder, seen = tmp_path / "run" / "checkpoints", []

    def marked(checkpoint):
        seen.append([c.name for c in checkpoints_in(folder) if is_whole(c, read=True)])
        mark_whole(checkpoint)

    monkeypatch.setattr(saving, "mark_whole", marked)
    train(values(model, tmp_path, keep_checkpoints=1, best_metric="last"))
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert names(folder) == ["checkpoint-6"]


@pytest.fixture(scope="module")
def worse():
    """Each evaluation finds a larger loss than the one before."""
    evaluate = RecipeTrainer.evaluate

    def found(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        return metrics | {n: v + self.state.global_step for n, v in metrics.items() if "loss" in n}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeTrainer, "evaluate", found)
        yield


@pytest.fixture(scope="module")
def stopped(model, worse, tmp_path_factory):
    """A folder with a run that was stopped after step 5, whose best checkpoint is that of step 2, and its recipe."""
    tmp_path = tmp_path_factory.mktemp("stopped")
    recipe = values(model, tmp_path, stop_after=5)
    train(recipe)
    checkpoints = tmp_path / "run" / "checkpoints"
    state = json.loads((checkpoints / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    assert names(checkpoints) == [f"checkpoint-{step}" for step in (2, 4, 5)]
    return tmp_path, recipe


@pytest.fixture
def resumable(stopped, tmp_path):
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    return stopped[1] | {"out": str(tmp_path / "run"), "resume": True}


def weights(folder):
    (file,) = folder.glob("*/adapter_model.safetensors")
    return load_file(file)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_checkpoint_is_found_after_the_folder_was_moved(resumable, tmp_path, one_thread):
    best = load_file(tmp_path / "run/checkpoints/checkpoint-2/adapter_model.safetensors")
    found = train(resumable)
    assert (found.status, found.problems) == ("finished", [])
    assert same(best, weights(tmp_path / "run"))


@pytest.mark.parametrize("fault", ["lost", "damaged"])
def test_a_best_checkpoint_that_is_gone_is_an_error(fault, resumable, tmp_path, one_thread):
    best = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    if fault == "lost":
        shutil.rmtree(best)
    else:
        file = best / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ContractError, match=f"the best checkpoint is {fault}: .*best_metric=last"):
        train(resumable)
    assert not (tmp_path / "run" / "adapter").exists()
    found = train(resumable, "training.best_metric=last")
    assert (found.status, found.steps) == ("finished", 6)


def test_a_best_checkpoint_that_goes_while_training_is_an_error(
    resumable, tmp_path, one_thread, monkeypatch
):
    step = saving.Trainer.training_step

    def loses(self, *args, **kwargs):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(saving.Trainer, "training_step", loses)
    with pytest.raises(ContractError, match="the best checkpoint is lost"):
        train(resumable)
    # The last step is done; the result is chosen without another one.
    monkeypatch.undo()
    with pytest.raises(ContractError, match="the best checkpoint is lost"):
        train(resumable)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert train(resumable, "training.best_metric=last").status == "finished"


def test_a_damaged_checkpoint_is_not_resumed_from(resumable, tmp_path, one_thread):
    file = tmp_path / "run" / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    lines = []
    train(resumable, say=lines.append)
    assert is_whole(file.parent, read=True)  # written again
    assert "ignoring incomplete or damaged checkpoints: checkpoint-5" in lines
    assert "resuming from checkpoint-4" in lines


def test_a_tensor_that_is_not_loaded_is_found(resumable, tmp_path, one_thread):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "lora_B" in name)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    mark_whole(checkpoint)
    with pytest.raises(ContractError, match=r"but 1 tensor of \d+ in memory are not those"):
        train(resumable)


def test_evaluations_that_are_no_number_are_a_problem(model, tmp_path, one_thread, monkeypatch):
    evaluate = RecipeTrainer.evaluate

    def broken(self, *args, **kwargs):
        if not self.is_in_train:
            return evaluate(self, *args, **kwargs)
        self.log({"eval_loss": float("nan")})
        return {"eval_loss": float("nan")}

    monkeypatch.setattr(RecipeTrainer, "evaluate", broken)
    found = train(values(model, tmp_path))
    assert len(found.problems) == 1
    assert "no evaluation found a number for eval_loss" in found.problems[0]


def full(where):
    """A function in place of one that writes a file: the disk is full."""

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", where)

    return fails


@pytest.mark.parametrize("place", ["weights", "optimizer", "mark"])
def test_a_full_disk_leaves_older_checkpoints(place, model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path))
    cases.run("train", file, f"out={tmp_path / 'whole'}")
    step = saving.checkpoint_of

    def plant(folder, number):
        if number == 4:
            targets = {
                "weights": ("peft.PeftModel.save_pretrained", full("adapter_model.safetensors")),
                "optimizer": ("torch.save", full("optimizer.pt")),
                "mark": ("peftkit.finetune.saving.mark_whole", full("whole.json")),
            }
            patch.setattr(*targets[place])
        return step(folder, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "checkpoint_of", plant)
        printed = cases.run("train", file, code=1)
    error = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert "checkpoint-4 could not be written: No space left on device. Make room" in error
    assert "checkpoint-2 is complete: continue with resume=true" in error
    assert "Traceback" not in printed
    assert names(tmp_path / "run" / "checkpoints") == ["checkpoint-2"]
    assert "resuming from checkpoint-2" in cases.run("train", file, "resume=true")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_writes_that_really_fail_are_explained(model, tmp_path, one_thread):
    """Both torch and safetensors raise errors of their own, here because files may not be larger."""
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, checkpoint_every=6))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, place in ((2**13, "safetensors"), (2**15, "torch")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            printed = cases.run("train", file, f"out={tmp_path / place}", code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = next(line for line in printed.splitlines() if line.startswith("error: "))
        assert "checkpoint-6 could not be written: " in error
        assert ("inline_container" if place == "torch" else "File too large") in error
        assert "there is no complete checkpoint yet: start again with resume=true" in error
        assert names(tmp_path / place / "checkpoints") == []


HOLDER = """
import sys, time
from pathlib import Path
from peftkit.finetune.run_lock import RunLock
from peftkit.finetune.trainer import RecipeTrainer
from peftkit.finetune.training import SingleRun
RunLock(Path(sys.argv[1]), print).take()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains in ``tmp_path / "run"``."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_until_its_process_is_dead(holder, model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path, max_steps=1))
    printed = cases.run("train", file, code=1)
    assert f"is in use by process {holder.pid} on " in printed
    assert "wait until it ends, end it, or name another folder" in printed
    holder.kill()
    holder.wait()
    # What the dead process has left is no run, so a new one can start.
    cases.run("train", file, "training.max_steps=3", "training.stop_after=1", code=3)
    lock = RunLock(tmp_path / "run", print)
    lock.take()
    with pytest.raises(ContractError, match="is in use by another run of this process"):
        train(values(model, tmp_path, max_steps=3) | {"resume": True})
    lock.close()
    train(values(model, tmp_path, max_steps=3) | {"resume": True})


def test_a_run_that_started_meanwhile_is_not_overwritten(model, tmp_path, one_thread, monkeypatch):
    prepare = SingleRun.prepare

    def slow(self):
        if not (tmp_path / "run").exists():
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "recipe.yaml").write_text("another run")
        return prepare(self)

    monkeypatch.setattr(SingleRun, "prepare", slow)
    with pytest.raises(ContractError, match="already has a run"):
        train(values(model, tmp_path))
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "another run"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    lines = []
    lock = RunLock(tmp_path, lines.append)
    lock.take()
    lock.close()
    assert lines == [
        f"{tmp_path} cannot be locked (No locks available); do not start a second run there"
    ]
