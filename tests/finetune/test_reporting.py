"""``training.report_to``: metrics are sent to other tools as well, or the missing package is named."""

import sys

import finetune_cases as cases
import pytest

WRITER = """
import json
from pathlib import Path

class SummaryWriter:
    def __init__(self, log_dir):
        self.folder = Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)

    def add_scalar(self, name, value, step):
        with (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps([name, value, step]) + "\\n")

    def add_text(self, *args):
        pass

    def flush(self):
        pass

    def close(self):
        pass
"""


@pytest.fixture
def file(tmp_path):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    values = cases.recipe(model, "sft", data, tmp_path / "run", data={"eval": 0.25})
    return cases.write_recipe(tmp_path / "r.yaml", values)


@pytest.mark.parametrize("tool", ["wandb", "mlflow"])
def test_a_missing_package_is_named(tool, file, tmp_path, monkeypatch):
    monkeypatch.setattr("peftkit.finetune.combinations.find_spec", lambda name: None)
    printed = cases.run("train", file, f"training.report_to=[{tool}]", code=1)
    assert f"training.report_to={tool} needs the package {tool}: pip install {tool}" in printed
    assert not (tmp_path / "run").exists()


def test_an_unknown_tool_is_refused(file):
    printed = cases.run("train", file, "training.report_to=[tensorbord]", code=1)
    assert "training.report_to has the entry 'tensorbord'" in printed


def test_tensorboard_gets_the_metrics(file, tmp_path, one_thread, monkeypatch):
    # A stand-in for the package tensorboardX, which transformers uses if tensorboard is missing.
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tensorboardX.py").write_text(WRITER)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cases.run("train", file, "training.report_to=[tensorboard]")
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.jsonl")
    names = [line.partition(",")[0] for line in events.read_text().splitlines()]
    assert names.count('["train/loss"') == 4
    assert '["eval/loss"' in names
    cases.run("eval", tmp_path / "run", "--data", tmp_path / "d.jsonl")
    assert len(events.read_text().splitlines()) == len(names)
