"""Files and folders are complete at every instant, and errors of the disk name them."""

import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from demo import files
from demo.files import DemoError, recover, replacing, swap_in, write_json, write_text


def _content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


_OLD, _NEW = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}


def _fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    _fill(folder, _OLD)
    return folder


class _Crash(BaseException):
    """The process ends here: nothing after it runs."""


def _crash_at(monkeypatch, step: int, after: bool) -> list[str]:
    """Crash before or after the file-system call number ``step``; returns the calls that were made."""
    calls: list[str] = []

    def watched(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == step and not after:
                raise _Crash
            result = real(*args, **kwargs)
            if len(calls) - 1 == step:
                raise _Crash
            return result

        return call

    monkeypatch.setattr(Path, "rename", watched("rename", Path.rename))
    monkeypatch.setattr(files.shutil, "rmtree", watched("rmtree", shutil.rmtree))
    return calls


def _replace(folder: Path, content: dict[str, str]) -> None:
    with replacing(folder) as partial:
        _fill(partial, content)


def test_a_folder_is_replaced(folder):
    _replace(folder, _NEW)
    assert _content(folder) == _NEW
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    _replace(tmp_path / "x" / "y", _NEW)
    assert _content(tmp_path / "x" / "y") == _NEW


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(5))
def test_an_interrupted_replacement_loses_nothing(folder, monkeypatch, step, after):
    with monkeypatch.context() as patch:
        calls = _crash_at(patch, step, after)
        with pytest.raises(_Crash):
            _replace(folder, _NEW)
        assert len(calls) == step + 1
    held = [f for f in (folder, folder.with_name("adapter.old")) if f.exists()]
    assert held
    assert _content(held[0]) in (_OLD, _NEW)
    recover(folder)
    assert _content(folder) in (_OLD, _NEW)
    assert not folder.with_name("adapter.old").exists()
    _replace(folder, {"d": "newest"})
    assert _content(folder) == {"d": "newest"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


def test_no_replacement_has_more_steps_than_are_interrupted(folder, monkeypatch):
    calls = _crash_at(monkeypatch, 5, after=False)
    _replace(folder, _NEW)
    assert len(calls) == 5


@pytest.mark.parametrize("step", range(2))
def test_an_interrupted_recovery_loses_nothing(folder, monkeypatch, step):
    folder.rename(folder.with_name("adapter.old"))
    with monkeypatch.context() as patch:
        _crash_at(patch, step, after=False)
        with pytest.raises(_Crash):
            recover(folder)
    recover(folder)
    assert _content(folder) == _OLD


def test_a_folder_that_could_not_be_filled_leaves_the_old_one(folder):
    def fail():
        with replacing(folder) as partial:
            (partial / "a").write_text("half")
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert _content(folder) == _OLD


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["full", "permissions", "safetensors", "torch"],
)
def test_errors_of_the_disk_name_the_folder_and_a_way_out(folder, error):
    def fail():
        with replacing(folder):
            raise error

    with pytest.raises(DemoError, match=r"adapter cannot be written \(.*--out"):
        fail()
    assert _content(folder) == _OLD


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    before = path.read_text()

    def half(self, text, encoding):
        self.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(
        DemoError, match=r"report.json cannot be written \(No space left on device\)"
    ):
        write_json(path, {"a": 2})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(
        DemoError, match=r"report.md cannot be written \((Not a directory|File exists)\)"
    ):
        write_text(tmp_path / "x" / "report.md", "text")


def test_swapping_into_an_empty_place(tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    swap_in(new, tmp_path / "folder")
    assert (tmp_path / "folder").is_dir()
    assert not new.exists()
