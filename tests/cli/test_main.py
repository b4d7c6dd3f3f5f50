"""The command line: what it prints, and how errors reach the user."""

import logging
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import peftkit
from peftkit.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def doctor_raises(monkeypatch):
    """Make ``peftkit doctor`` raise an error."""

    def install(error):
        def diagnose():
            raise error

        monkeypatch.setattr("peftkit.doctor.diagnose", diagnose)

    return install


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"peftkit {peftkit.__version__}\n")


def test_bitsandbytes_asks_for_no_kernel_that_is_not_used():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    try:
        assert run("plan", "--help").exit_code == 0
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)


def test_help_names_the_commands_and_loads_nothing_heavy():
    code = """
import sys
from typer.testing import CliRunner
from peftkit.cli.main import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0 and "check" in result.output and "doctor" in result.output, result.output
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_expected_error_is_one_line(doctor_raises):
    doctor_raises(FileNotFoundError("no checkpoint in out/demo;\nrun without --resume"))
    result = run("doctor")
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
def test_an_error_of_the_disk_is_one_line(doctor_raises, error):
    doctor_raises(error)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr == f"error: [Errno {error.errno}] {error.strerror}: 'out/x'\n"


def test_another_error_of_the_system_keeps_its_traceback(doctor_raises):
    doctor_raises(ConnectionResetError(104, "Connection reset by peer"))
    assert isinstance(run("doctor").exception, ConnectionResetError)


@pytest.mark.parametrize("module", ["peftkit.anything", "peftkit_kernels.anything"])
def test_our_own_value_error_is_one_line(monkeypatch, module):
    namespace = {"__name__": module}
    exec("def refuse(): raise ValueError('[r]=0')", namespace)
    monkeypatch.setattr("peftkit.doctor.diagnose", namespace["refuse"])
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (1, "error: [r]=0\n")


def test_unexpected_error_keeps_its_traceback(doctor_raises):
    doctor_raises(ValueError("too many values to unpack"))
    result = run("doctor")
    assert isinstance(result.exception, ValueError)
    assert result.exc_info[2] is not None
