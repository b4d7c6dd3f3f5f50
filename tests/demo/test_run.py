"""Whole runs on a tiny model: what is left behind, Ctrl-C, and going on."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from peftkit.demo import run
from peftkit.demo.files import read_json
from peftkit.demo.phases import _Run
from peftkit.demo.progress import Display

PROVED = {
    "plain_peft_agrees": True,
    "merged_agrees": True,
    "prompts": 3,
    "scored_tokens": 9,
    "plain": {"same_texts": 3, "logit_error": 1e-6, "plain_logit_error": 1e-6},
    "merged": {"same_texts": 3, "logit_error": 1e-6, "plain_logit_error": 1e-6},
}


@pytest.fixture
def no_proof(monkeypatch):
    """Leaves out the fresh process, which costs ten seconds."""
    monkeypatch.setattr(_Run, "_prove", lambda self: dict(PROVED))


def press_ctrl_c(monkeypatch, phase, at, times=1):
    """Send SIGINT when the display shows that ``at`` units of the phase are done."""
    advance_to = Display.advance_to

    def pressed(self, done, note=""):
        advance_to(self, done, note)
        if self._title == phase and done == at:
            for _ in range(times):
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
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert "<svg" not in (out / "report.html").read_text()  # embedded, not loose
    assert "exact match" in capfd.readouterr().out
    assert not list(out.rglob("*.partial"))
