"""The facts about the hardware, read from the files and libraries of each system, which are replaced here."""

import os
import platform
import subprocess
import types

import psutil
import pytest
import torch

from peftkit import machine
from peftkit.environment import describe_environment

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9755 128-Core Processor
flags\t\t: fpu avx2 avx512f avx512_vnni
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve
"""


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    """Replace the Linux kernel's description of the processor; ``None`` removes it."""

    def replace(text):
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(machine, "_CPUINFO", path)

    return replace


@pytest.fixture
def system(monkeypatch):
    """Replace what ``platform`` says."""

    def replace(system, architecture, processor=""):
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(platform, "processor", lambda: processor)

    return replace


def capability(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


@pytest.mark.parametrize(
    ("text", "model", "instructions"),
    [
        (X86, "AMD EPYC 9755 128-Core Processor", "AVX-512, AVX2"),
        (X86 + "flags : amx_tile\n", "AMD EPYC 9755 128-Core Processor", "AVX-512, AVX2"),
        (X86.replace("fpu", "amx_tile"), "AMD EPYC 9755 128-Core Processor", "AMX, AVX-512, AVX2"),
        (ARM, None, "SVE, NEON"),
    ],
)
def test_linux(cpuinfo, system, text, model, instructions):
    cpuinfo(text)
    system("Linux", "aarch64" if text == ARM else "x86_64", "aarch64" if text == ARM else "")
    found = machine.describe_machine()
    assert (found["processor"], found["instructions"]) == (model, instructions)


def test_macos(cpuinfo, system, monkeypatch):
    cpuinfo(None)
    system("Darwin", "arm64", "arm")
    capability(monkeypatch, "DEFAULT")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    done = types.SimpleNamespace(stdout="Apple M3 Max\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = machine.describe_machine()
    assert found["processor"] == "Apple M3 Max"
    assert found["instructions"] == "NEON"
    assert found["cores"] == os.cpu_count()
    assert [gpu["kind"] for gpu in found["gpus"]] == ["mps"]


@pytest.mark.parametrize(
    ("name", "instructions"),
    [("AVX512", "AVX-512"), ("AVX512_VNNI", "AVX-512"), ("AVX2", "AVX2"), ("DEFAULT", None)],
)
def test_windows(cpuinfo, system, monkeypatch, name, instructions):
    cpuinfo(None)
    system("Windows", "AMD64", "AMD64 Family 25 Model 97, AuthenticAMD")
    capability(monkeypatch, name)
    found = machine.describe_machine()
    assert found["processor"] == "AMD64 Family 25 Model 97, AuthenticAMD"
    assert found["instructions"] == instructions


def test_what_cannot_be_read_is_unknown_and_raises_nothing(cpuinfo, system, monkeypatch):
    cpuinfo(None)
    system("Darwin", "", "")
    capability(monkeypatch, "DEFAULT")

    def fail(*arguments, **options):
        raise OSError("hidden")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(psutil, "virtual_memory", fail)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    found = machine.describe_machine()
    assert found.pop("cores") == 1
    assert found.pop("gpus") == []
    assert set(found.values()) == {None}
    assert describe_environment()["cpu"] == ""


@pytest.mark.parametrize(("text", "limit"), [("4294967296\n", 2**32), ("max\n", None)])
def test_memory_and_the_limit_of_a_container(monkeypatch, tmp_path, text, limit):
    memory = types.SimpleNamespace(total=2**35, available=2**34)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "_MEMORY_LIMIT", tmp_path / "memory.max")
    assert machine.describe_machine()["memory_limit_bytes"] is None
    (tmp_path / "memory.max").write_text(text)
    found = machine.describe_machine()
    assert (found["memory_bytes"], found["available_bytes"]) == (2**35, 2**34)
    assert found["memory_limit_bytes"] == limit


class Properties(types.SimpleNamespace):
    """What torch says of a GPU."""


def with_gpus(monkeypatch, *properties, hip=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.version, "hip", hip)

    def of(index):
        if properties[index] is None:
            raise RuntimeError("CUDA error: unknown error")
        return properties[index]

    monkeypatch.setattr(torch.cuda, "get_device_properties", of)


def test_nvidia_gpus(monkeypatch):
    card = Properties(name="NVIDIA H100 80GB HBM3", total_memory=2**36, major=9, minor=0)
    with_gpus(monkeypatch, card, None)
    first, second = machine.gpus()
    assert first == {
        "name": "NVIDIA H100 80GB HBM3",
        "kind": "cuda",
        "memory_bytes": 2**36,
        "capability": "9.0",
    }
    assert second == {"name": None, "kind": "cuda", "memory_bytes": None, "capability": None}


def test_amd_gpus(monkeypatch):
    card = Properties(name="MI300X", total_memory=1, major=9, minor=4, gcnArchName="gfx942")
    with_gpus(monkeypatch, card, hip="7.0")
    assert [(gpu["kind"], gpu["capability"]) for gpu in machine.gpus()] == [("rocm", "gfx942")]
