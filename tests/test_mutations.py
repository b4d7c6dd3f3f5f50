"""Bugs planted into kernels are noticed by the tests that say so."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import mutate
import pytest
from mutation import KINDS, Mutation
from mutations import MUTATIONS


def run(*options):
    command = [sys.executable, str(Path(mutate.__file__)), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_bug_can_be_planted(mutation):
    spec = importlib.util.find_spec(f"peftkit_kernels.{mutation.module}")
    source = Path(spec.origin).read_text()
    changed = mutate.mutated_source(source, mutation)
    assert changed != source
    compile(changed, spec.origin, "exec")
    assert mutation.kind in KINDS


@pytest.mark.parametrize("test", sorted({m.test for m in MUTATIONS}))
def test_every_named_test_exists(test):
    path, _, name = test.partition("::")
    function = name.partition("[")[0]
    assert f"\ndef {function}(" in (mutate.ROOT / path).read_text()


def test_the_quick_ones_are_of_every_kind():
    assert {mutation.kind for mutation in MUTATIONS if mutation.quick} == set(KINDS)


@pytest.mark.parametrize(
    ("kernel", "old", "message"),
    [
        ("shrink", "M", "there is no kernel shrink in low_rank.kernels"),
        ("shrink_kernel", "offs_m", "'offs_m' occurs .* times in the kernel, not once"),
        ("shrink_kernel", "offs_x", "'offs_x' occurs 0 times in the kernel, not once"),
    ],
)
def test_a_line_that_no_longer_fits_is_refused(kernel, old, message):
    source = Path(importlib.util.find_spec("peftkit_kernels.low_rank.kernels").origin).read_text()
    with pytest.raises(ValueError, match=message):
        mutate.mutated_source(source, Mutation("low_rank.kernels", kernel, "mask", old, "", ""))


def test_one_bug_of_every_kind_is_caught():
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{len(KINDS)} of {len(KINDS)} bugs caught" in done.stdout


def test_a_bug_that_is_none_survives(monkeypatch, capsys):
    harmless = Mutation("x", "some_kernel", "mask", "a", "b", "tests/test_versions.py", True)
    monkeypatch.setattr(mutate, "MUTATIONS", [harmless])
    monkeypatch.setattr(mutate, "planted", lambda mutation: mutate.contextlib.nullcontext())
    monkeypatch.setattr(mutate, "run", lambda *tests: (pytest.ExitCode.OK, ""))
    assert mutate.main([]) == 1
    assert "SURVIVED  some_kernel: mask" in capsys.readouterr().out


def test_an_unknown_kernel_is_refused_with_the_choices():
    done = run("--kernel", "shrink")
    assert done.returncode == 2
    assert "there is no bug for shrink; kernels: shrink_kernel, expand_kernel" in done.stderr


@pytest.mark.slow
def test_every_bug_is_caught():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
