"""``peftkit plan``: tables, data, recipes and errors, from a folder that has nothing but a config."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from peftkit.cli.main import app


@pytest.fixture
def folder(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_table_and_data_agree(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = (folder, "--device", "cpu", "--seq-len", "64", "--batch-size", "2")
    found = json.loads(run(*options, "--json"))
    assert found["peak_bytes"] == sum(found["items"].values())
    assert found["settings"]["optimizer"] == "adamw_fused"
    text = run(*options)
    assert f"{found['peak_bytes'] / 2**20:.2f} MiB" in text
    assert "frozen weights" in text


def test_fit_writes_a_recipe_of_the_first_row(folder, tmp_path):
    out = tmp_path / "recipe.yaml"
    options = (folder, "--device", "cpu", "--seq-len", "64", "--fit", "3MiB", "--base", "fp32")
    found = json.loads(run(*options, "--out", str(out), "--json"))
    best = found["options"][0]["settings"]
    assert all(o["reserved_bytes"] <= 3 * 2**20 for o in found["options"])
    assert yaml.safe_load(out.read_text()) == {
        "model": folder,
        "base": "fp32",
        "strategy": {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {
            "batch_size": best["batch_size"],
            "seq_len": 64,
            "gradient_checkpointing": best["checkpointing"],
            "optimizer": "adamw_torch_fused",
        },
    }


def test_nothing_fits(folder, tmp_path):
    out = tmp_path / "recipe.yaml"
    options = (folder, "--device", "cpu", "--seq-len", "64", "--base", "fp32", "--out", str(out))
    text = run(*options, "--fit", "100KiB", code=1)
    assert "nothing fits into 100.00 KiB; the nearest needs" in " ".join(text.split())
    assert not out.exists()


def test_errors_are_one_line(folder):
    assert "error: device='X9' is unknown" in run(folder, "--device", "X9", code=1)
    assert "error: method='magic' is unknown" in run(folder, "--method", "magic", code=1)
    assert "has no config.json" in run(f"{folder}/..", code=1)


def test_a_plan_is_written_as_a_page_and_a_picture(folder, tmp_path):
    page, picture = tmp_path / "plan.html", tmp_path / "plan.svg"
    options = ("--device", "L4", "--seq-len", "64", "--html", str(page), "--image", str(picture))
    output = run(folder, *options)
    assert output.count("written to") == 2
    assert "L4" in page.read_text()
    assert "L4" in picture.read_text()
