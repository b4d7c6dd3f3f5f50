"""The command line: what it prints, and how errors reach the user."""

import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

import peftkit
from peftkit.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def fake_demo(monkeypatch):
    """Replace ``peftkit.demo`` by a module whose ``run`` does what the test says."""

    def install(behaviour):
        module = types.ModuleType("peftkit.demo")
        module.run = behaviour
        monkeypatch.setitem(sys.modules, "peftkit.demo", module)

    return install


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"peftkit {peftkit.__version__}\n")


def test_help_names_the_commands_and_loads_nothing_heavy():
    code = """
import sys
from typer.testing import CliRunner
from peftkit.cli.main import app
result = CliRunner().invoke(app, ["demo", "--help"])
assert result.exit_code == 0 and "--no-compare" in result.output, result.output
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_demo_passes_its_options_on(fake_demo, tmp_path):
    seen = {}

    def record(**kwargs):
        seen.update(kwargs)
        return 3

    fake_demo(record)
    report = tmp_path / "report.json"
    result = run("demo", "--resume", "--no-compare", "--json", str(report), "--out", str(tmp_path))
    assert result.exit_code == 3
    assert seen == {"out": tmp_path, "resume": True, "compare": False, "json_path": report}


def test_expected_error_is_one_line(fake_demo):
    def refuse(**kwargs):
        raise FileNotFoundError("no checkpoint in out/demo;\nrun without --resume")

    fake_demo(refuse)
    result = run("demo")
    assert result.exit_code == 1
    assert result.stderr == "error: no checkpoint in out/demo; run without --resume\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "out/x"),
        PermissionError(13, "Permission denied", "out/x"),
    ],
    ids=["full", "permissions"],
)
def test_an_error_of_the_disk_is_one_line(fake_demo, error):
    def refuse(**kwargs):
        raise error

    fake_demo(refuse)
    result = run("demo")
    assert result.exit_code == 1
    assert result.stderr == f"error: [Errno {error.errno}] {error.strerror}: 'out/x'\n"


def test_another_error_of_the_system_keeps_its_traceback(fake_demo):
    def defect(**kwargs):
        raise ConnectionResetError(104, "Connection reset by peer")

    fake_demo(defect)
    assert isinstance(run("demo").exception, ConnectionResetError)


def test_our_own_value_error_is_one_line(fake_demo):
    code = compile("def refuse(**kwargs): raise ValueError('[r]=0')", "ours", "exec")
    namespace = {"__name__": "peftkit.anything"}
    exec(code, namespace)
    fake_demo(namespace["refuse"])
    result = run("demo")
    assert (result.exit_code, result.stderr) == (1, "error: [r]=0\n")


def test_unexpected_error_keeps_its_traceback(fake_demo):
    def defect(**kwargs):
        raise ValueError("too many values to unpack")

    fake_demo(defect)
    result = run("demo")
    assert isinstance(result.exception, ValueError)
    assert result.exc_info[2] is not None
