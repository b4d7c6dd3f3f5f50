"""``peftkit doctor``: facts about this machine, as tables and as data."""

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from lab.cases import OPERATIONS
from lab.inventory import OPS
from peftkit import doctor
from peftkit.cli.main import app
from peftkit_kernels import native


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_data_names_versions_and_a_path_with_its_reason_for_every_operation():
    found = json.loads(run("--json"))
    assert found["packages"]["peft"] == version("peft")
    assert found["environment"]["device"] == "CPU"
    assert found["warnings"] == []
    rows = {row["operation"]: row for row in found["operations"]}
    assert {"lora_linear", "linear_cross_entropy", "prefix_attention"} <= rows.keys()
    for row in rows.values():
        assert row["path"] == "torch"
        assert row["reason"]


def test_operations_with_kernels_are_those_that_the_lab_verifies():
    assert {name for name, has_kernels in doctor.operations().items() if has_kernels} == set(OPS)
    reasons = {row["operation"]: row["reason"] for row in doctor.diagnose()["operations"]}
    assert reasons.keys() == OPERATIONS.keys()
    for operation, reason in reasons.items():
        assert ("no Triton kernel" in reason) == (operation not in OPS)


def test_tables_show_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run()
    assert version("transformers") in text
    for name in doctor.operations():
        assert name in text


def test_what_is_missing_is_said(monkeypatch):
    def absent(name):
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr(native, "obstacle", lambda: "no C compiler is on the PATH")
    found = doctor.diagnose()
    assert found["packages"]["bitsandbytes"] is None
    assert "no C compiler is on the PATH" in found["cpu"].values()
    assert "not installed" in run()


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_version_newer_than_tested_is_a_warning(monkeypatch, name):
    monkeypatch.setattr("peftkit.versions.NEWEST_TESTED", {name: "0.1"})
    assert f"newer than tested: {name} {version(name)}" in doctor.diagnose()["warnings"][0]
    assert "newer than tested" in run()
