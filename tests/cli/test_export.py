"""``peftkit export``: a model folder, an adapter folder, an adapter alone, and errors of one line."""

import json

import export_cases
import models
import peft
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from peftkit import LoraConfig
from peftkit.cli.main import app


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output  # progress bars are on stderr


@pytest.fixture
def adapter(tmp_path):
    tokenizer = export_cases.byte_level("llama-bpe")
    model = models.tiny("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_models_and_adapters(adapter, tmp_path):
    base, out = tmp_path / "base", tmp_path / "m.gguf"
    text = run(base, out, "--gguf")
    assert "llama, 21 tensors in f16" in text
    assert "logits read back by transformers: difference" in text
    found = json.loads(run(adapter, out, "--base", base, "--dtype", "f32", "--json"))
    assert (found["dtype"], found["tensors"], found["path"]) == ("f32", 21, str(out))
    assert found["difference"] < found["bound"]
    assert "no tokenizer" in run(base, out, "--no-tokenizer")
    run(adapter, out, "--base", base, "--adapter-only")
    assert GGUFReader(out).fields["general.type"].contents() == "adapter"


def test_errors_are_one_line(adapter, tmp_path):
    base = tmp_path / "base"
    out = tmp_path / "m.gguf"
    assert "dtype='q2' is unknown" in run(base, out, "--dtype", "q2", code=1)
    assert "bound=1e-12" in run(base, out, "--dtype", "q8_0", "--bound", "1e-12", code=1)
    assert "ends in .gguf" in run(base, tmp_path / "m.bin", code=1)
    assert "pass base" in run(adapter, out, "--adapter-only", code=1)
    assert not out.exists()
