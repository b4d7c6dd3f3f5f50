"""``peftkit merge``: a table and a verdict, one JSON document, and an exit code that says whether the merge is good."""

import json

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from peftkit.cli.main import app


@pytest.fixture(autouse=True)
def _quick(one_thread, monkeypatch):
    """Tiny models gain nothing from more threads; tables are as wide as they like."""
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and an adapter whose config names it."""
    path = tmp_path_factory.mktemp("merge")
    models.tiny("llama").save_pretrained(path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    cases.trained(get_peft_model(base, config)).save_pretrained(path / "adapter")
    return path


def test_the_table_and_the_verdict(folder, tmp_path):
    text = run(folder / "adapter", tmp_path / "merged", "--dtype", "fp32")
    for part in ("default (LORA)", "the weights of the model", "random token ids", "recovery"):
        assert part in text
    assert "one layer at a time" in text
    assert "merged: recovery 1.00000, at least 0.9999 was asked for" in text
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(weight), base.get_parameter(weight))


def test_json_and_an_explicit_base(folder, tmp_path):
    found = json.loads(
        run(folder / "adapter", folder / "base", tmp_path / "merged", "--json", "--any-recovery")
    )
    assert found["out_dir"] == str(tmp_path / "merged")
    assert found["dtype"] == "bf16"
    assert 0.9 < found["recovery"] <= 1
    assert len(found["layers"]) == 4
    written = json.loads((tmp_path / "merged/merge.json").read_text())
    assert {**written, "out_dir": found["out_dir"]} == found


def test_a_quantised_base(folder, tmp_path):
    found = json.loads(
        run(
            *(folder / "adapter", tmp_path / "merged", "--quantize", "int8", "--dtype", "base"),
            *("--json", "--any-recovery"),
        )
    )
    assert found["merged_into"].startswith("the quantised weights (int8)")
    assert found["base_read_from"].endswith(
        "loaded into memory as a whole: it is quantised to int8"
    )
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"] is True


def test_a_merge_that_is_refused(folder, tmp_path):
    text = run(folder / "adapter", tmp_path / "merged", "--min-recovery", "1", code=1)
    assert "is below min_recovery=1.0" in text
    assert [path.name for path in tmp_path.iterdir()] == ["merged.rejected.json"]


def test_errors_are_one_line(folder, tmp_path):
    assert "give ADAPTER [BASE] OUT, not 1 paths" in run(folder / "adapter", code=2)
    assert "is not a folder" in run(tmp_path / "nowhere", tmp_path / "merged", code=1)
    text = run(folder / "adapter", tmp_path / "none", tmp_path / "merged", code=1)
    assert "the base model" in text
    assert "cannot be loaded" in text
    assert "dtype='int3' is unknown" in run(
        folder / "adapter", tmp_path / "merged", "--dtype", "int3", code=1
    )
    assert "quantize='fp4' is unknown" in run(
        folder / "adapter", tmp_path / "merged", "--quantize", "fp4", code=1
    )
    (tmp_path / "texts").write_text("one text\n")
    assert "needs a tokenizer" in run(
        folder / "adapter", tmp_path / "merged", "--probe", tmp_path / "texts", code=1
    )
    assert "give either" in run(
        *(folder / "adapter", tmp_path / "merged", "--min-recovery", "1", "--any-recovery"), code=2
    )
    assert not (tmp_path / "merged").exists()


def test_a_larger_vocabulary_in_the_adapter(folder, tmp_path):
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(models.VOCAB_SIZE + 4, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = cases.trained(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    run(tmp_path / "adapter", folder / "base", tmp_path / "merged", "--dtype", "fp32")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = cases.inputs()
    torch.testing.assert_close(
        cases.logits(loaded, batch), cases.logits(model, batch), rtol=1e-4, atol=1e-4
    )
