"""``peftkit doctor``: facts about this machine, as tables and as data."""

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from typer.testing import CliRunner

from lab.cases import OPERATIONS
from lab.inventory import OPS
from peftkit import doctor
from peftkit.cli.main import app
from peftkit_kernels import gemm, native
from peftkit_kernels.ops import attention


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


MACHINE = {
    "processor": "AMD EPYC",
    "architecture": "x86_64",
    "instructions": "AVX-512, AVX2",
    "cores": 2,
    "memory_bytes": 2**34,
    "available_bytes": 2**33,
    "memory_limit_bytes": None,
    "gpus": [],
}
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "kind": "cuda",
    "memory_bytes": 80 * 2**30,
    "capability": "9.0",
}
UNKNOWN = dict.fromkeys(MACHINE) | {"cores": 1, "gpus": []}


@pytest.fixture
def pretend(monkeypatch):
    """Replace the facts about the machine and the choice of the products."""

    def replace(facts, *, onednn_obstacle=None, native_obstacle=None):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(doctor, "describe_machine", lambda: MACHINE | facts)
        monkeypatch.setattr(gemm, "onednn_obstacle", lambda: onednn_obstacle)
        monkeypatch.setattr(native, "obstacle", lambda: native_obstacle)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    return replace


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_a_measured_processor(pretend):
    pretend({})
    text = run()
    for fact in ("AMD EPYC", "AVX-512, AVX2", "16.0 GiB, available 8.0 GiB"):
        assert fact in text
    assert lines_with(text, "float32 products", "oneDNN, because MKL")
    assert lines_with(text, "CPU", "SmolLM2-135M", "(measured)", "AMD EPYC, 2 threads")
    assert lines_with(text, "GPU", "none")
    assert "not measured" not in text


def test_a_processor_without_onednn(pretend):
    pretend({"processor": "Xeon"}, onednn_obstacle="MKL itself uses AVX-512 on Intel's processors")
    text = run()
    assert lines_with(text, "the BLAS of PyTorch, because MKL itself uses AVX-512")
    assert lines_with(text, "CPU", "(predicted)", "Intel")
    assert "CPU: this processor was not measured" in text
    (row,) = json.loads(run("--json"))["expectations"]
    assert row["step_time_basis"] == "predicted"


def test_gpus_of_several_kinds(pretend, monkeypatch):
    old = {"name": "Tesla T4", "kind": "cuda", "memory_bytes": 2**34, "capability": "7.5"}
    amd = {"name": "MI300X", "kind": "rocm", "memory_bytes": None, "capability": "gfx942"}
    pretend({"gpus": [H100, old, amd]})
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    attention.device_obstacle.cache_clear()
    text = run()
    attention.device_obstacle.cache_clear()
    assert lines_with(text, "GPU 0", "H100", "memory 80.0 GiB, compute capability 9.0")
    assert lines_with(text, "GPU 2", "MI300X: memory unknown, compute capability gfx942")
    assert lines_with(text, "attention, GPU 0", "cuDNN (dense causal")
    assert lines_with(text, "attention, GPU 1", "that PyTorch chooses, because", "sm_75")
    assert lines_with(text, "attention, GPU 2", "because cuDNN needs an NVIDIA GPU")
    assert lines_with(text, "H100", "Llama-3.1-8B", "(measured)", "NVIDIA H100 80GB")
    assert lines_with(text, "Tesla T4", "not measured")
    assert "MI300X: no GPU of this kind was measured." in text


def test_a_machine_that_hides_everything(pretend):
    obstacle = "the native passes are built on Linux only, not on Darwin"
    pretend(UNKNOWN, onednn_obstacle="this build of PyTorch has no MKL", native_obstacle=obstacle)
    text = run()
    for fact in ("processor", "architecture", "instruction sets"):
        assert lines_with(text, fact, "unknown")
    assert lines_with(text, "memory", "unknown, available unknown")
    assert lines_with(text, "element-wise passes", obstacle)
    assert lines_with(text, "CPU", "SmolLM2-135M", "not measured", "(predicted)")
    found = json.loads(run("--json"))
    assert found["machine"] == UNKNOWN
    assert found["expectations"][0]["step_time"] is None


def test_the_limit_of_a_container(pretend):
    pretend({"memory_limit_bytes": 2**32})
    assert lines_with(run(), "memory limit of the container", "4.0 GiB")
