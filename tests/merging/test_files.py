"""The folder is complete or absent: full disk, killed process, existing and unwritable folders; shards and their index."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from peftkit import ContractError, merge
from peftkit.merging import checkpoint
from peftkit.merging.files import ShardWriter, new_folder, parse_size

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return cases.adapted("LoRA")


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.tensor(3),
        "d": torch.randint(0, 255, (9,), dtype=torch.uint8),
        "e": torch.randn(4, 6).T,
        "f": torch.tensor([True, False, True]),
        "g": torch.zeros(0, 4),
        "h": torch.randn(5, dtype=torch.float64),
    }
    writer = ShardWriter(tmp_path, 10**9, names=1)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    with pytest.raises(ValueError, match="a was written twice"):
        writer.add("a", torch.zeros(1))
    writer.finish(parameters=100)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_more_names_than_expected_begin_a_new_file(tmp_path):
    writer = ShardWriter(tmp_path, 10**9, names=0)
    for i in range(100):
        writer.add(f"some.long.name.of.a.layer.{i}", torch.full((2,), float(i)))
    writer.finish(parameters=200)
    files = cases.tensors(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert all(files[f"some.long.name.of.a.layer.{i}"][0] == i for i in range(100))


@pytest.mark.parametrize("size", [20_000, "20KB"])
def test_shards_have_an_index_and_load(model, size, tmp_path):
    merge(model, tmp_path / "merged", "fp32", max_shard_size=size, certificate=False)
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors = cases.tensors(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    batch = cases.inputs()
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        cases.logits(loaded, batch), cases.logits(model, batch), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("size", ["5 apples", "", "0", "-3"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size="):
        parse_size(size)


def test_folders_that_are_in_use(model, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("kept")
    with pytest.raises(ContractError, match="exists and is not a folder"):
        merge(model, tmp_path / "file")
    with pytest.raises(ContractError, match="is not empty"):
        merge(model, tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    merge(model, tmp_path / "empty", certificate=False, rounding="nearest")
    merge(model, tmp_path / "deep/er", certificate=False, rounding="nearest")
    assert (tmp_path / "empty/model.safetensors").is_file()
    assert (tmp_path / "deep/er/config.json").is_file()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_an_unwritable_parent(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/merged' could not be written .*; nothing was left there"
    ):
        merge(model, tmp_path / "file/merged")


def test_too_little_space_is_noticed_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"the merged model needs .* GiB and the disk has") as found:
        merge(model, tmp_path / "merged")
    assert found.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(model, tmp_path):
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(OSError, match="could not be written"):
            merge(model, tmp_path / "merged", "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merge(model, tmp_path / "merged", "fp32")


_KILLED = """
import sys, time
import merge_cases as cases
from peftkit import merge
from peftkit.merging.files import ShardWriter
add = ShardWriter.add
def slow(self, name, tensor):
    add(self, name, tensor)
    print("written", flush=True)
    time.sleep(0.5)
ShardWriter.add = slow
merge(cases.adapted("LoRA"), sys.argv[1], "fp32")
"""


def test_a_killed_process_leaves_no_folder_that_looks_complete(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "merged")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "written\n"
        assert child.stdout.readline() == "written\n"
        time.sleep(0.1)
        child.kill()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith("merged.partial-")
    assert not list(left[0].glob("*.safetensors"))
    assert not (left[0] / "config.json").exists()
    merge(cases.adapted("LoRA"), tmp_path / "merged", certificate=False)


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "merged") as folder:
            (folder / "file").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_recovery_below_the_threshold_is_refused(tmp_path, monkeypatch):
    model = cases.adapted("LoRA")

    def damaged(self, layer, exact, cast, inputs):
        return torch.zeros_like(cast) if layer.in_features == 48 else cast

    monkeypatch.setattr("peftkit.merging.layers.LayerMerger._round", damaged)
    with pytest.raises(
        ContractError, match=r"(?s)recovery=.* is below min_recovery=0\.9999.*down_proj"
    ) as found:
        merge(model, tmp_path / "merged", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["merged.rejected.json"]
    report = json.loads((tmp_path / "merged.rejected.json").read_text())
    assert report["accepted"] is False
    assert f"recovery={report['recovery']:.4f}" in str(found.value)
    assert report["recovery"] < 0.9
    kept = merge(model, tmp_path / "merged", "fp32", min_recovery=None)
    assert kept.accepted
    assert json.loads((tmp_path / "merged/merge.json").read_text())["recovery"] == kept.recovery


def test_an_untrained_adapter_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(models.tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ContractError, match="changes no output on the probe"):
        merge(model, tmp_path / "merged", "fp32")
    found = merge(model, tmp_path / "merged", "fp32", min_recovery=None)
    assert found.recovery is None


def test_values_too_large_for_float16(tmp_path):
    model = cases.adapted("LoRA")
    norm = model.base_model.model.model.norm
    norm.weight.data[0] = 1e6
    with pytest.raises(ContractError, match=r"model\.norm\.weight are too large for float16"):
        merge(model, tmp_path / "merged", "fp16")
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = (
        float("nan")
    )
    with pytest.raises(ContractError, match=r"q_proj\.weight has values that are not finite"):
        merge(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int4"}, "dtype='int4' is unknown; pass one of bf16"),
        ({"rounding": "up"}, "rounding='up' is unknown"),
        ({"min_recovery": 2}, "min_recovery=2 is not a number up to 1"),
        ({"min_recovery": "high"}, "min_recovery='high' is not a number"),
        ({"probe": ["text"]}, "consists of texts; pass tokenizer="),
        ({"probe": {}}, "batch is empty"),
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"tokenizer": "/nowhere"}, "is not a folder with the files of a tokenizer"),
    ],
)
def test_arguments_that_are_wrong(model, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        merge(model, tmp_path / "merged", **changes)
    assert list(tmp_path.iterdir()) == []


def test_images_need_a_probe(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(models.tiny("vit"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ContractError, match=r"pass probe=\{'pixel_values': \.\.\.\}"):
        merge(cases.trained(model), tmp_path / "merged")


def test_constants_name_every_storage():
    assert set(checkpoint.DTYPES) == {"bf16", "fp16", "fp32", "base"}
    assert set(checkpoint.MIN_RECOVERY) == {"float32", "16 bit", "int8", "nf4"}
