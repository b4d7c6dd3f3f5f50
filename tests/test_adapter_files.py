"""Files that cannot be read are refused with their name and a way out."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftkit import ContractError
from peftkit.adapter_files import read_config, read_tensors, require_model, weights_file


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# Configs

_NOT_CONFIGS = {
    "half a file": (b'{"r": ', ("is not JSON in UTF-8",)),
    "empty": (b"", ("is not JSON in UTF-8",)),
    "not UTF-8": (b'{"r": "\xff\xfe"}', ("is not JSON in UTF-8", "0xff")),
    "UTF-16": ('{"r": 8}'.encode("utf-16"), ("is not JSON in UTF-8",)),
    "a list": (b"[1, 2]", ("it holds [1, 2], not an object",)),
    "a number": (b"5", ("it holds 5, not an object",)),
    "null": (b"null", ("it holds None, not an object",)),
    "a string": (b'"' + b"x" * 100 + b'"', ("it holds 'xxxxx", "..., not an object")),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, ("too deeply",)),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ("too deeply",)),
    "a field twice": (b'{"r": 8, "alpha": 1, "r": 16}', ("sets 'r' 2 times",)),
    "infinity": (b'{"lora_alpha": Infinity}', ("lora_alpha=inf is not a finite number",)),
    "an overflow": (b'{"lora_alpha": 1e999}', ("lora_alpha=inf is not a finite number",)),
    "nan in a pattern": (b'{"rank_pattern": {"q": [1, NaN]}}', ("rank_pattern.q[1]=nan",)),
    "too many digits": (b'{"r": ' + b"9" * 5000 + b"}", ("is not JSON in UTF-8", "digits")),
}


@pytest.mark.parametrize("name", _NOT_CONFIGS)
def test_a_file_that_is_not_a_config(tmp_path, name):
    content, parts = _NOT_CONFIGS[name]
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)
    with _raises(str(file), *parts):
        read_config(tmp_path)


def test_a_config_is_read_in_utf_8(tmp_path):
    written = {"base_model_name_or_path": "d\u00e9j\u00e0", "r": 8, "deep": {"er": [1.5, None]}}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(written, ensure_ascii=False), encoding="utf-8"
    )
    assert read_config(tmp_path) == written


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "adapter_config.json"
    with file.open("wb") as stream:
        stream.truncate(2**25)
    with _raises("has 32 MiB, but a config has a few KiB"):
        read_config(tmp_path)


def test_a_missing_folder(tmp_path):
    with _raises("nothing' is not a folder", "snapshot_download"):
        read_config(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["\0", "x" * 5000], ids=["a null byte", "too long"])
def test_a_name_that_no_folder_can_have(tmp_path, name):
    with _raises("x" if name[0] == "x" else "is not a folder"):
        read_config(tmp_path / name)


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with _raises("a' is a symbolic link that does not lead to a folder"):
        read_config(tmp_path / "a")


def test_a_folder_with_the_name_of_the_config(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    with _raises("adapter_config.json is a folder, not a file"):
        read_config(tmp_path)


def test_a_folder_without_a_config(tmp_path):
    (tmp_path / "b.txt").touch()
    (tmp_path / "a.txt").touch()
    with _raises("adapter_config.json does not exist", "it holds a.txt, b.txt"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (PermissionError(13, "Permission denied"), ("may not be read by this user", "permissions")),
        (OSError(5, "Input/output error"), ("cannot be read", "Input/output error", "the disk")),
    ],
    ids=["permissions", "disk"],
)
def test_a_file_that_the_system_does_not_give(tmp_path, monkeypatch, error, parts):
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")

    def refuse(self):
        raise error

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with _raises(str(file), *parts):
        read_config(tmp_path)


# Weights


class _Code:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def _load(file):
    return read_tensors(file, lambda: torch.load(file, map_location="cpu", weights_only=True))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_contains_code(tmp_path, capfd, form):
    file = tmp_path / "adapter_model.bin"
    content = {"a": torch.ones(2), "b": _Code()} if form != "plain" else {"b": _Code()}
    if form == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with _raises(f"{file} contains code (posix.system)", "it was not loaded", ".safetensors"):
        _load(file)
    assert capfd.readouterr().out == ""


def test_a_whole_module_is_code_too(tmp_path):
    file = tmp_path / "adapter_model.bin"
    torch.save(torch.nn.Linear(2, 2), file)
    with _raises("contains code (torch.nn.modules.linear.Linear)"):
        _load(file)


def _truncated(tmp_path, legacy):
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.ones(100)}, file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(file.read_bytes()[:-200])
    return file


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file(tmp_path, legacy):
    file = _truncated(tmp_path, legacy)
    with _raises(f"{file} cannot be read", "damaged or incomplete, copy or save it again"):
        _load(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"hello, this is text", b"<html></html>"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_another_kind(tmp_path, content):
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content)
    with pytest.raises(ContractError, match="damaged or incomplete") as caught:
        _load(file)
    assert "weights_only" not in str(caught.value)


def test_a_pointer_of_git_lfs(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    with _raises("is a Git LFS pointer", "git lfs pull"):
        _load(file)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {}], ids=["list", "int", "nothing"])
def test_a_file_without_named_tensors(tmp_path, content):
    file = tmp_path / "adapter_model.bin"
    torch.save(content, file)
    with _raises(str(file), "tensors", "save the adapter again"):
        _load(file)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64]
)
def test_numbers_that_are_not_finite(dtype):
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")]).to(dtype)}
    file = Path(__file__)
    with _raises("1 tensor of", "holds NaN or infinite values", "  bad"):
        read_tensors(file, lambda: tensors)


def test_sound_tensors_are_returned(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int8)}
    file = tmp_path / "adapter_model.bin"
    torch.save({**tensors, "c": torch.nn.Parameter(torch.ones(1))}, file)
    assert sorted(_load(file)) == ["a", "b", "c"]


def test_the_first_file_that_exists_is_taken(tmp_path):
    names = ("a.safetensors", "b.bin")
    with _raises(f"{tmp_path} holds none of a.safetensors, b.bin"):
        weights_file(tmp_path, names)
    (tmp_path / "b.bin").touch()
    assert weights_file(tmp_path, names).name == "b.bin"
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert weights_file(tmp_path, names).name == "a.safetensors"


def test_a_folder_with_the_name_of_the_weights(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with _raises("a.safetensors is not a file"):
        weights_file(tmp_path, ("a.safetensors",))


# Arguments


def test_arguments_of_other_types():
    model = torch.nn.Linear(2, 2)
    require_model(model, "folder", "f(model, path)")
    with _raises("the arguments are swapped", "path is a Linear", "call f(model, path)"):
        require_model("folder", model, "f(model, path)")
    with _raises("model='id' is of type str, not a model"):
        require_model("id", "folder", "f(model, path)")
    with _raises("path=None is of type NoneType, not a path"):
        require_model(model, None, "f(model, path)")
