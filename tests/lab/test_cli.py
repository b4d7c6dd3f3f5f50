"""``make kernels``: what each command prints, its exit status, and its errors."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run import app
from typer.testing import CliRunner

from lab import child
from lab.cases import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == status, result.output
    return result


def rows(*arguments, status=0):
    """The one document on stdout."""
    document = json.loads(run(*arguments, "--json", status=status).stdout)
    assert list(document) == ["rows"]
    assert document["rows"]
    return document["rows"]


@pytest.fixture
def here(monkeypatch):
    """Child processes are spared: this one interprets already."""

    def call(module, function, *, interpret, **arguments):
        return getattr(importlib.import_module(f"lab.{module}"), function)(**arguments)

    monkeypatch.setattr(child, "call", call)


@pytest.fixture
def gives(monkeypatch):
    """Every child answers with these rows."""

    def install(answer):
        monkeypatch.setattr(child, "call", lambda *names, **arguments: answer)

    return install


def test_the_script_runs_from_any_folder(tmp_path):
    script = ROOT / "tools" / "run.py"
    command = [sys.executable, script, "kernels", "list", "--op", "lora_linear", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["op"] == "lora_linear"


@pytest.mark.parametrize(("command", "named"), [("kernels", "traffic"), ("demo", "--no-compare")])
def test_help_loads_nothing_heavy(command, named):
    code = f"""
import sys
from typer.testing import CliRunner
from run import app
result = CliRunner().invoke(app, [{command!r}, "--help"])
assert result.exit_code == 0 and {named!r} in result.output, result.output
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_list_names_every_operation(monkeypatch):
    found = {row["op"]: row for row in rows("list")}
    assert found.keys() == OPERATIONS.keys()
    row = found["lora_linear"]
    assert row["implementations"] == ["reference", "torch", "triton"]
    assert row["computes"] == "A frozen linear with a low-rank update."
    assert "s = x A" in row["keeps"]
    assert all(row["computes"].endswith(".") for row in found.values())
    monkeypatch.setenv("COLUMNS", "200")
    assert "A frozen linear with a low-rank update." in run("list").stdout


def test_the_index_of_operations_says_the_same():
    page = (ROOT / "kernels" / "README.md").read_text()
    index = re.findall(r"^\| (`[a-z0-9_`, ]+`) \| .+ \| (.+) \|$", page, flags=re.MULTILINE)
    kept = {name: words for names, words in index for name in re.findall(r"`(\w+)`", names)}
    assert kept == {op: found.keeps or "nothing" for op, found in OPERATIONS.items()}


def test_check_compares_in_a_child_that_interprets():
    found = rows("check", "--op", "lora_linear")
    assert {row["dtype"] for row in found} == {"bfloat16", "float16", "float32"}
    for row in found:
        assert row["problems"] == []
        assert row["compared"] == 4


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_a_problem_is_the_exit_status(gives, command):
    problems = ["output0 is off by 3, allowed 1"]
    gives([{"op": "lora_linear", "problems": problems}])
    (row,) = rows(command, status=1)
    assert row["problems"] == problems
    gives([{"op": "lora_linear", "problems": []}])
    run(command)


def test_bytes_beside_the_rule_are_the_exit_status(gives):
    row = {"op": "lora_linear", "kernel": "sum", "unique_bytes": 3, "as_formula": True}
    gives([row])
    run("traffic")
    gives([row, row | {"as_formula": False}])
    run("traffic", status=1)


def test_inspect_reads_machine_code_of_the_targets_named():
    targets = ("cuda:90", "hip:gfx942")
    options = [option for target in targets for option in ("--arch", target)]
    found = rows("inspect", *options, "--op", "int8")
    assert {row["arch"] for row in found} == set(targets)
    for row in found:
        assert row["kernel"].endswith("_kernel")
        assert row["registers"] > 0
        assert row["stack"] == row["spills"] == 0
        assert row["load_widths"]
        assert row.keys() >= {"config", "shared_bytes", "occupancy", "tensor_instructions"}


def test_inspect_asks_for_the_quick_targets_unless_told(monkeypatch):
    asked = []
    monkeypatch.setattr(child, "call", lambda *a, **k: asked.append(k) or [{"problems": []}])
    run("inspect")
    run("inspect", "--all", "--arch", "cuda:120")
    assert [(ask["archs"], ask["every"]) for ask in asked] == [([], False), (["cuda:120"], True)]


def test_traffic_has_every_launch_and_the_sum(here):
    found = rows("traffic", "--op", "lora_linear")
    assert [row["kernel"] for row in found[-2:]] == ["2 torch ops", "sum"]
    assert found[-1]["unique_bytes"] == sum(row["unique_bytes"] for row in found[:-1])
    assert found[-1]["eager_bytes"] > found[-1]["unique_bytes"]


def test_predict_says_that_nothing_was_measured(here, monkeypatch):
    found = rows("predict", "--op", "lora_linear")
    assert {row["device"] for row in found} == {"A100", "H100", "RTX 4090"}
    assert all(row["speedup"] > 1 for row in found)
    monkeypatch.setenv("COLUMNS", "200")
    text = run("predict", "--op", "lora_linear").stdout
    assert "not measured" in text
    assert f"{found[0]['speedup']:.2f}" in text


@pytest.mark.parametrize("command", ["list", "check", "inspect", "traffic", "predict"])
def test_an_unknown_op_is_one_line_with_the_choices(command):
    result = run(command, "--op", "lora", status=1)
    assert "error: op='lora' is unknown; use one of lora_linear, lora_qkv" in result.stderr
    assert result.stdout == ""


def test_an_unknown_target_is_one_line_with_the_choices():
    result = run("inspect", "--arch", "cuda:7", status=1)
    assert "error: arch='cuda:7' is unknown; use one of cuda:80, cuda:86" in result.stderr


@pytest.mark.parametrize("command", ["check", "inspect", "traffic", "predict"])
def test_without_triton_a_sentence(monkeypatch, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(command, status=1)
    assert "Triton is not installed" in result.stderr
    assert "pip install triton" in result.stderr


def test_a_child_that_fails_is_no_result():
    with pytest.raises(RuntimeError, match=r"check\.rows failed in a child process"):
        child.call("check", "rows", interpret=False, ops=["lora_linear"])
