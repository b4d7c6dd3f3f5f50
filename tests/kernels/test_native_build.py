"""How the native library is built, kept and found again, and what makes a library in the cache doubtful."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import native_cache
import pytest
from markers import needs_native

from peftkit_kernels import native
from peftkit_kernels.native import build


class Builder:
    """``build.load`` in an empty cache folder, with a compiler of one's own."""

    def __init__(self, tmp_path, monkeypatch):
        self.cache, self.bin = tmp_path / "cache", tmp_path / "bin"
        self.own = build.load(native.SYMBOLS).path
        self.patch, self.found = monkeypatch, shutil.which("cc") or shutil.which("gcc")
        self.bin.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.delenv("PEFTKIT_NATIVE", raising=False)
        monkeypatch.setattr(build.platform, "system", lambda: "Linux")
        self.only(None)

    def only(self, compiler):
        """Make ``compiler`` the one that is found."""
        self.patch.setattr(build.shutil, "which", lambda name: compiler if name == "gcc" else None)

    def script(self, text):
        """Make a shell script the compiler; in it ``$all`` are its arguments, ``$out`` the file to write."""
        path = self.bin / "gcc"
        path.write_text(
            '#!/bin/sh\nall="$*"\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n' + text
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.only(str(path))

    def copying(self):
        """Make a compiler that is quick: it copies the library of this machine."""
        self.script(f"exec cp '{self.own}' \"$out\"")

    def load(self):
        """What is found, not remembered."""
        return build.load.__wrapped__(native.SYMBOLS)

    def obstacle(self):
        """Why there is no library."""
        found = self.load()
        assert found.library is None
        return found.obstacle

    @property
    def files(self):
        """Everything in the cache folder."""
        return sorted(self.cache.rglob("*")) if self.cache.exists() else []


@pytest.fixture
def builder(tmp_path, monkeypatch):
    return Builder(tmp_path, monkeypatch)


def test_no_compiler_is_a_sentence(builder):
    assert builder.obstacle() == "no C compiler (cc, gcc or clang) is on the PATH"


def test_switched_off_and_other_systems_are_sentences(builder, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert builder.obstacle() == "the native passes are built on Linux only, not on Darwin"
    monkeypatch.setenv("PEFTKIT_NATIVE", "0")
    assert builder.obstacle() == "the native passes are switched off (PEFTKIT_NATIVE=0)"


def test_a_broken_compiler_is_a_sentence_and_leaves_nothing(builder):
    builder.script('echo half > "$out"; echo "no space left" >&2; exit 1')
    obstacle = builder.obstacle()
    assert "gcc failed" in obstacle
    assert "no space left" in obstacle
    assert builder.files == [builder.cache / "peftkit"]


def test_a_compiler_that_says_nothing_is_a_sentence(builder):
    builder.script("exit 3")
    assert builder.obstacle().endswith("gcc failed: no message")


def test_a_compiler_that_writes_nothing_is_a_sentence(builder):
    builder.script("exit 0")
    assert "could not be compiled into" in builder.obstacle()


@pytest.mark.parametrize("command", ["exec sleep 20", "sleep 20 & wait"])
def test_a_compiler_that_hangs_is_a_sentence_and_leaves_nothing(builder, monkeypatch, command):
    monkeypatch.setattr(build, "_TIMEOUT_SECONDS", 0.3)
    builder.script(f'echo half > "$out"; {command}')
    start = time.monotonic()
    obstacle = builder.obstacle()
    assert time.monotonic() - start < 10
    assert "could not be compiled" in obstacle
    assert "timed out" in obstacle
    assert builder.files == [builder.cache / "peftkit"]


def test_a_cache_folder_that_cannot_be_made_is_a_sentence(builder):
    builder.script("exit 0")
    builder.cache.write_text("a file where the folder should be")
    assert "could not be compiled into" in builder.obstacle()


def test_something_that_is_no_library_is_a_sentence_and_is_not_kept(builder):
    builder.script('echo nonsense > "$out"')
    assert "cannot be loaded" in builder.obstacle()
    assert builder.files == [builder.cache / "peftkit"]


@needs_native
def test_a_library_without_a_function_is_a_sentence_and_is_not_kept(builder):
    builder.script(f'echo "int other;" > "$out.c"; {builder.found} -shared "$out.c" -o "$out"')
    assert builder.obstacle().endswith(f"has no function {native.SYMBOLS[0]}")
    assert builder.files == [builder.cache / "peftkit"]


@needs_native
def test_the_library_appears_whole_and_is_found_again(builder):
    seen = builder.bin.parent / "seen"
    look = f'ls "{builder.cache}/peftkit" > "{seen}"; ls -i "$out" >> "{seen}"'
    builder.script(f"eval {builder.found} $all\n{look}")
    first = builder.load()
    assert first.library is not None, first.obstacle
    assert first.note == ""
    *before, built = seen.read_text().splitlines()
    assert not [name for name in before if name.endswith(".so")], "one not finished could be loaded"
    # renamed, not copied: nobody can see a part of it
    assert int(built.split()[0]) == first.path.stat().st_ino
    builder.only(None)
    again = builder.load()
    assert again.library is not None, again.obstacle
    assert again.path == first.path
    assert [file for file in builder.files if file.is_file()] == [
        first.path.with_suffix(".sha256"),
        first.path,
    ]


@needs_native
def test_nobody_else_may_write_what_is_kept_whatever_the_umask(builder):
    builder.copying()
    before = os.umask(0)
    try:
        assert builder.load().library is not None
    finally:
        os.umask(before)
    for path in (builder.cache, *builder.files):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
    builder.only(None)
    assert builder.load().library is not None


@pytest.fixture(scope="module")
def doubts(tmp_path_factory):
    """What ``native_cache.load_doubtful`` says of every case; in another process, which a bad library could end."""
    folder = tmp_path_factory.mktemp("doubts")
    result = subprocess.run(
        [sys.executable, native_cache.__file__, folder], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return json.loads(result.stdout)


@needs_native
@pytest.mark.parametrize("name", native_cache.CASES)
def test_a_library_in_doubt_is_built_again(doubts, name):
    found = doubts[name]
    assert found["with a compiler"].startswith("built again because the library in the cache")
    assert found["afterwards"] == ""
    assert "no C compiler" in found["without a compiler"]
    assert "the library in the cache is not used" in found["without a compiler"]


@needs_native
def test_a_folder_above_that_others_may_write_is_a_reason(builder):
    builder.copying()
    assert builder.load().library is not None
    builder.cache.chmod(0o777)
    obstacle = builder.obstacle()
    assert f"other users may write to {builder.cache}" in obstacle
    assert "chmod go-w" in obstacle
    builder.cache.chmod(0o1777)  # as /tmp: others can neither rename nor remove what is not theirs
    assert builder.load().note == ""


@needs_native
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", ["", "peftkit"])
def test_someone_elses_folder_is_a_reason_and_stays_as_it_is(builder, name):
    builder.copying()
    library = builder.load().path
    before = library.stat()
    os.chown(builder.cache / name, 12345, 12345)
    obstacle = builder.obstacle()
    assert "belongs to user 12345" in obstacle
    assert "XDG_CACHE_HOME" in obstacle
    assert library.stat() == before


@needs_native
def test_processes_that_build_at_the_same_time_do_not_disturb_each_other(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PEFTKIT_NATIVE": "1"}
    command = [sys.executable, "-c", native_cache.USE]
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {child.communicate(timeout=200)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    (library,) = tmp_path.rglob("*.so")
    assert said == {str(library)}


def test_code_has_no_avx512_if_torch_is_kept_from_it(monkeypatch):
    flags, prints = {}, {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(build.torch.cpu, "_is_avx512_supported", lambda: True)
        flags[capability], prints[capability] = build._flags(), build._fingerprint()
    assert "-march=x86-64-v3" in flags["AVX2"]
    assert "-march=native" in flags["AVX512"]
    assert prints["AVX2"] != prints["AVX512"]
    monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(build.torch.cpu, "_is_avx512_supported", lambda: False)
    assert "-march=native" in build._flags()
