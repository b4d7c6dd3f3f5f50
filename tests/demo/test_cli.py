"""``make demo``: its options, its exit status, and how errors reach the user."""

import run
from typer.testing import CliRunner

import demo


def invoke(*arguments: str):
    return CliRunner().invoke(run.app, ["demo", *arguments])


def test_options_are_passed_on(monkeypatch, tmp_path):
    seen = {}

    def record(**kwargs):
        seen.update(kwargs)
        return 3

    monkeypatch.setattr(demo, "run", record)
    report = tmp_path / "report.json"
    result = invoke("--resume", "--no-compare", "--json", str(report), "--out", str(tmp_path))
    assert result.exit_code == 3
    assert seen.pop("minutes") == 25
    assert seen == {"out": tmp_path, "resume": True, "compare": False, "json_path": report}


def test_nothing_to_resume_is_one_line(tmp_path):
    result = invoke("--resume", "--out", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: out={tmp_path}")
    assert result.stderr.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def defect(**kwargs):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(demo, "run", defect)
    assert isinstance(invoke().exception, ValueError)
