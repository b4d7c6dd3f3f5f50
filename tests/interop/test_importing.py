"""``import_adapter`` names what it cannot use, and a failed import leaves the model as it was."""

import json
import re

import models
import pytest
import torch
from safetensors.torch import save_file
from unchanged import differences, everything

from peftkit import BottleneckConfig, ContractError, import_adapter, wrap


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def _write(folder, config, tensors):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")


def test_arguments_of_other_types_are_named(tmp_path):
    model = models.tiny("bert")
    with _raises("the arguments are swapped", "import_adapter(model, path)"):
        import_adapter(tmp_path, model)
    with _raises("path=None is of type NoneType"):
        import_adapter(model, None)
    with _raises("adapter_name='a.b'"):
        import_adapter(model, tmp_path, "a.b")


def test_tensors_that_are_no_weights(tmp_path):
    _write(tmp_path, {"config": {}}, {"x": torch.ones(2).int(), "y": torch.ones(2)})
    with _raises("1 tensor in ", "adapter.safetensors", "floating-point", "x: torch.int32"):
        import_adapter(models.tiny("bert"), tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(TypeError("planted"), ContractError), (ContractError("planted"), ContractError)],
    ids=["damaged content", "a reason of its own"],
)
def test_an_import_that_fails_after_the_injection_is_undone(tmp_path, monkeypatch, error, expected):
    def fail(model, checkpoint, adapter_name):
        wrap(model, BottleneckConfig(), adapter_name=adapter_name)
        raise error

    monkeypatch.setattr("peftkit.interop.importing.import_bottlenecks", fail)
    _write(tmp_path, {"config": {}}, {"x": torch.ones(2)})
    model = models.tiny("bert")
    before = everything(model)
    with pytest.raises(expected, match="planted"):
        import_adapter(model, tmp_path)
    assert differences(before, everything(model)) == []
