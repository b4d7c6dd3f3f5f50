"""Runs: the same cases each time, going on where a run ended, shrinking, and scripts that reproduce."""

import json
import os
import runpy
import time

import pytest
from fuzz import run, script
from fuzz.compare import Finding, same_fault
from fuzz.corners import CORNERS
from fuzz.planting import plant
from fuzz.session import State, case_at, go_on, record
from fuzz.shrink import explains, shrink
from fuzz.touches import TOUCHES
from fuzz.worker import Worker, verdict


def noting(seen):
    """A verdict that notes the cases it gets and finds nothing."""
    return lambda case: seen.append(case)


def test_a_case_is_the_same_each_time_and_can_be_written():
    for number in range(len(CORNERS) + 40):
        case = case_at(3, number)
        assert case == case_at(3, number)
        assert case == json.loads(json.dumps(case))
    assert case_at(3, 200) != case_at(4, 200)


def test_every_corner_names_options_that_exist():
    for corner in CORNERS:
        assert corner.get("touch", "other eps") in TOUCHES
        assert corner.get("touch_first", "other eps") in TOUCHES


def test_an_interrupted_run_goes_on_at_the_same_case(tmp_path):
    whole, first, second = [], [], []
    go_on(State(1), noting(whole), tmp_path / "whole", cases=7)
    go_on(State(1), noting(first), tmp_path / "parts", cases=3)
    go_on(
        State.load(tmp_path / "parts" / "state.json"), noting(second), tmp_path / "parts", cases=4
    )
    assert first + second == whole
    assert State.load(tmp_path / "parts" / "state.json").next == 7


def test_a_case_that_stops_the_run_is_examined_again(tmp_path):
    def stopping(case):
        if case == case_at(1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go_on(State(1), stopping, tmp_path, cases=5)
    assert State.load(tmp_path / "state.json").next == 2
    assert not list(tmp_path.glob("*.partial"))


def test_the_time_limit_ends_a_run(tmp_path):
    state = State(1)
    go_on(state, noting([]), tmp_path, minutes=0.0)
    assert state.next == 0


def test_shrinking_leaves_what_the_fault_needs():
    case = {"seed": 1, "family": "gpt2", "dtype": "float32", "rows": 3, "length": 33, "train": True}
    case |= {"values": ["mean", "large"], "lora.r": 17, "padding": "left"}

    def fails(c):
        return "large" in c.get("values", []) and c.get("length", 8) > 8

    shrunk = shrink(case, fails)
    assert shrunk == {
        "seed": 1,
        "family": "linear",
        "dtype": "float64",
        "length": 17,
        "values": ["large"],
    }
    assert explains(
        shrunk, case | {"family": "linear", "dtype": "float64", "length": 17, "values": ["large"]}
    )
    assert not explains(shrunk, case)


def test_another_fault_of_the_same_kind_is_not_taken_for_the_first():
    large = Finding("values", "loss", size=0.3)
    assert same_fault(Finding("values", "grad a", size=0.1), large)
    assert not same_fault(Finding("values", "grad a", size=1e-4), large)
    assert not same_fault(
        Finding("error", "wrap", fused="raises KeyError"),
        Finding("error", "wrap", fused="raises TypeError"),
    )
    assert same_fault(
        Finding("report", "LoRA a.b is reported peft (no)"),
        Finding("report", "LoRA c.d.e is reported peft (so)"),
    )


def test_a_failure_is_shrunk_and_written_as_a_script_that_shows_both_values(
    tmp_path, monkeypatch, capsys
):
    plant(monkeypatch, "lora_linear", lambda op: lambda *args, **kw: op(*args, **kw) * 1.001)
    case = {
        "family": "linear",
        "seed": 5,
        "dtype": "float64",
        "rows": 3,
        "lora.r": 8,
        "train": True,
    }
    failure = record(case, verdict(case), verdict)
    assert failure["shrunk"] == {"family": "linear", "seed": 5, "dtype": "float64"}
    runpy.run_path(str(script.write(tmp_path, failure["shrunk"], failure["what"])))
    shown = capsys.readouterr().out
    assert "output: norm" in shown
    assert "values: output; stock PEFT norm" in shown


def test_a_failure_that_a_shrunk_one_explains_is_only_counted(tmp_path):
    def failing(case):
        return Finding("values", "loss", size=1.0) if case["family"] == "linear" else None

    state = State(2)
    go_on(state, failing, tmp_path, cases=len(CORNERS) + 30, say=lambda line: None)
    (failure,) = state.failures
    assert failure["shrunk"]["dtype"] == "float64"
    assert state.repeated > 0
    assert len(list(tmp_path.glob("fail_*.py"))) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_case_that_ends_or_stops_the_interpreter_is_a_finding(monkeypatch):
    def ending(case):
        if case["seed"] == 1:
            os._exit(3)
        if case["seed"] == 2:
            time.sleep(60)

    monkeypatch.setattr("fuzz.worker.examine", ending)
    worker = Worker(limit=5)
    try:
        assert worker({"seed": 0}) is None
        assert worker({"seed": 1}).kind == "crash"
        assert worker({"seed": 0}) is None
        assert worker({"seed": 2}).kind == "hang"
    finally:
        worker.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_command_says_by_its_status_whether_a_case_failed(tmp_path, monkeypatch, capsys):
    folder = ["--out", str(tmp_path), "--usual"]
    monkeypatch.setattr("fuzz.worker.examine", lambda case: None)
    assert run.main(["--cases", "2", *folder]) == 0
    monkeypatch.setattr(
        "fuzz.worker.examine", lambda case: Finding("values", "loss", "1", "2", 1.0)
    )
    assert run.main(["--cases", "1", "--resume", *folder]) == 1
    shown = capsys.readouterr().out
    assert "3 cases, 2 agree" in shown
    assert "loss; stock PEFT 1; fused 2" in shown


def test_resuming_without_a_state_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--resume", "--out", str(tmp_path)])
    assert "run without --resume first" in capsys.readouterr().err
