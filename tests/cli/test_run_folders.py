"""The folder of a finished run stands for its adapter in every command that takes an adapter."""

import json

import finetune_cases as cases
import pytest


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model = cases.save_model(folder / "m", "llama", chat=True)
    training = {"max_steps": 2, "samples": 0, "lr": 1e-2}
    values = cases.recipe(model, "sft", cases.chats(8), folder / "run", training=training)
    rows = cases.write_jsonl(folder / "rows.jsonl", values["data"]["train"])
    return cases.write_recipe(folder / "r.yaml", values | {"data": {"train": str(rows)}})


@pytest.fixture(scope="module")
def run(recipe):
    cases.run("train", recipe, "--quiet")
    return recipe.parent / "run"


def test_it_is_merged_as_its_adapter(run, tmp_path):
    for number, source in enumerate((run, run / "adapter")):
        cases.run("merge", source, tmp_path / str(number), "--dtype", "fp32")
    files = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(2)]
    assert files[0] == files[1]


def test_it_is_checked_as_its_adapter(run):
    found = [
        json.loads(cases.run("check", source, "--target", "peft", "--json"))
        for source in (run, run / "adapter")
    ]
    assert found[0] == found[1]


def test_it_is_converted_and_exported_as_its_adapter(run, tmp_path):
    for number, source in enumerate((run, run / "adapter")):
        cases.run("convert", source, tmp_path / str(number), "--uniform")
        cases.run("export", source, tmp_path / f"{number}.gguf", "--adapter-only")
    for name in ("0/adapter_model.safetensors", "0.gguf"):
        other = tmp_path / name.replace("0", "1", 1)
        assert (tmp_path / name).read_bytes() == other.read_bytes()


def test_a_run_that_is_not_finished_is_refused(recipe, tmp_path):
    out = tmp_path / "stopped"
    cases.run("train", recipe, f"out={out}", "training.stop_after=1", "--quiet", code=3)
    for command in (("merge", out, tmp_path / "x"), ("check", out, "--target", "peft")):
        assert "is not finished (stopped)" in " ".join(cases.run(*command, code=1).split())
    assert not (tmp_path / "x").exists()
