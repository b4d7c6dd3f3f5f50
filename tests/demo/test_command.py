"""Commands that can be copied and run."""

import sys
from pathlib import Path

import pytest

from demo import command
from demo.command import demo_command, peftkit_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the project with the environment of ``make demo``, as the present folder."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "peftkit"):
        (scripts / name).touch()
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setattr(command, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("checkout")
def test_in_the_project_make_is_enough():
    assert demo_command([]) == "make demo"
    assert demo_command(["--resume"]) == "make demo ARGS=--resume"
    assert demo_command(["--resume", "--out", "a b"]) == "make demo ARGS=\"--resume --out 'a b'\""
    assert peftkit_command("doctor") == ".venv/bin/peftkit doctor"


def test_elsewhere_the_command_has_whole_paths(checkout, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    python, script = checkout / ".venv/bin/python", checkout / "tools/run.py"
    assert demo_command(["--resume"]) == f"{python} {script} demo --resume"
    assert peftkit_command("doctor") == f"{checkout}/.venv/bin/peftkit doctor"


def test_the_script_of_the_command_exists():
    words = demo_command(["--help"]).split()
    assert words[0] == "make" or (ROOT / words[1]).is_file()
