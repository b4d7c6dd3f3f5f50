"""``peftkit check``: tables, one JSON document, and an exit code that says whether it fits."""

import json

import models
import pytest
from typer.testing import CliRunner

from peftkit import LoraConfig, PrefixConfig, wrap
from peftkit.cli.main import app


@pytest.fixture(autouse=True)
def _quick(one_thread, monkeypatch):
    """Tiny models gain nothing from more threads; tables are as wide as they like."""
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    wrap(models.tiny("llama"), config).save_pretrained(tmp_path / "adapter")
    models.tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "adapter"


def test_an_adapter_that_fits(adapter, tmp_path):
    text = run(adapter, "--base", tmp_path / "base")
    for part in (
        "LORA, written by PEFT",
        "8 float32",
        "q_proj (2), v_proj (2)",
        "4 (4 times)",
        "lora_A.weight [4, 32]",
    ):
        assert part in text
    assert "loads in peft" in text
    found = json.loads(run(adapter, "--target", "vllm", "--json"))
    assert found["fits"] is True
    assert (found["method"], found["target"], found["modules"]) == (
        "LORA",
        "vllm",
        {"q_proj": 2, "v_proj": 2},
    )
    assert len(found["shapes"]) == len(found["rows"]) == 8
    assert {row["verdict"] for row in found["rows"]} == {"loads"}
    assert found["serves"] == "as trained"
    assert found["notes"]


def test_one_that_does_not_fit_gives_the_reason_and_status_1(tmp_path):
    wrap(models.tiny("llama"), PrefixConfig()).save_pretrained(tmp_path)
    assert "does not fit: peft_type: refused, because vLLM loads only LoRA adapters" in run(
        tmp_path, "--target", "vllm", code=1
    )
    found = json.loads(run(tmp_path, "--target", "vllm", "--json", code=1))
    assert (found["fits"], len(found["problems"])) == (False, 1)
    assert "import peftkit.bridge" in run(tmp_path)


def test_a_report_for_each_server(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], use_rslora=True, init_lora_weights=False
    )
    wrap(models.tiny("llama"), config).save_pretrained(tmp_path / "lora")
    assert "vLLM 0.33.0 (commit 4ba787ec9): loads in vllm; serves as trained" in run(
        tmp_path / "lora", "--target", "vllm"
    )
    text = run(tmp_path / "lora", "--target", "sglang", code=1)
    for part in ("q_proj.lora_B", "SGLang multiplies by lora_alpha / r", "serves differently"):
        assert part in text
    assert "rank 4 is greater than --max-lora-rank 2" in run(
        tmp_path / "lora", "--target", "sglang", "--max-rank", "2", code=1
    )
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "lora"), str(tmp_path / "out"), "--uniform"]
    )
    assert result.exit_code == 0, result.output
    assert "serves as trained" in run(tmp_path / "out", "--target", "sglang")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    wrap(models.tiny("llama"), config).save_pretrained(tmp_path / "zero")
    assert "serves as the base model" in run(tmp_path / "zero", code=1)


def test_errors_are_one_line(tmp_path):
    assert "is not a folder" in run(tmp_path / "nowhere", code=1)
    assert "give either the folder of an adapter or --family" in run(code=2)
    assert "give either the folder of an adapter or --family" in run(
        tmp_path, "--family", "x", code=2
    )
    assert "--method 'lora' is unknown; use one of LoRA" in run(
        "--family", "qwen2", "--method", "lora", code=1
    )
    assert "'no_such' is not a model type of transformers" in run("--family", "no_such", code=1)


def test_an_architecture_is_tried(tmp_path):
    """StableLM is in no list of ours."""
    found = json.loads(run("--family", "stablelm", "--method", "gated prefix", "--json"))
    assert found["model"] == "StableLmForCausalLM"
    cells = {name: cell["verdict"] for name, cell in found["methods"]["gated prefix"].items()}
    assert cells.pop("merge") == "no"
    assert set(cells.values()) == {"yes"}, found
    text = run("--family", "stablelm", "--method", "LoRA")
    assert "A tiny StableLmForCausalLM" in text
    assert "fails" not in text
