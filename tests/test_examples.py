"""Every example runs as a user would run it, on tiny local models, and uses public names only."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import finetune_cases as cases
import models
import peft
import pytest
import retrieval_cases
import segmentation_cases
import speech_cases
import tokenizers
import torch
import transformers as hf
import vision_chat_cases

import peftkit

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process with the given arguments; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def local_model(tmp_path):
    """Save a tiny model with a tokenizer of single characters; returns the folder."""

    def save(name: str) -> Path:
        letters = {chr(code): code - 32 + 3 for code in range(32, 122)}
        vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | letters
        assert max(vocabulary.values()) < models.VOCAB_SIZE
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        folder = tmp_path / name
        models.tiny(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_finetune_causal_lm_learns_and_saves_for_plain_peft(run, local_model, tmp_path):
    folder = local_model("llama")
    out = run("finetune_causal_lm.py", "--model", folder, "--out", tmp_path / "out", "--steps", 30)
    losses = [float(value) for value in re.findall(r"step \d+: loss (\d+\.\d+)", out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 6.0
    assert len(re.findall(r" -> .* \(expected \d{4}-\d\d-\d\d\)", out)) == 3
    assert_trained(folder, tmp_path / "out")


def test_finetune_causal_lm_reads_json_lines(run, local_model, tmp_path):
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)))
    out = run(
        *("finetune_causal_lm.py", "--model", local_model("llama"), "--data", data),
        *("--out", tmp_path / "out", "--steps", 2, "--batch-size", 4),
    )
    assert [line[:9] for line in out.splitlines()[-3:]] == ["say 5 -> ", "say 6 -> ", "say 7 -> "]


def test_trainer_text_classification_trains_saves_and_resumes(run, local_model, tmp_path):
    arguments = ("--model", local_model("bert"), "--out", tmp_path / "out", "--examples", 64)
    first = run("trainer_text_classification.py", *arguments, "--epochs", 1)
    assert re.search(r"accuracy on words not seen in training: [01]\.\d+", first)
    run("trainer_text_classification.py", *arguments, "--epochs", 2)
    checkpoints = tmp_path / "out" / "checkpoints"
    states = {
        path.name: json.loads((path / "trainer_state.json").read_text())
        for path in checkpoints.glob("checkpoint-*")
    }
    assert set(states) == {"checkpoint-4", "checkpoint-8"}
    assert len(states["checkpoint-8"]["log_history"]) > len(states["checkpoint-4"]["log_history"])
    assert not list(checkpoints.glob("*/model*"))
    base = hf.AutoModelForSequenceClassification.from_pretrained(
        arguments[1], num_labels=4, ignore_mismatched_sizes=True
    )
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert any("classifier.modules_to_save" in name for name, _ in loaded.named_parameters())


def test_explain_and_restore_shows_all_five_parts(run, local_model):
    out = run("explain_and_restore.py", "--model", local_model("llama"))
    assert re.findall(r"^(\d)\. ", out, flags=re.MULTILINE) == list("12345")
    assert "_'" in out.split("2. What")[0]
    assert "fused 100 % of the adapter layers" in out
    assert "variant" in out
    assert "strict=True" in out.split("4. What")[1]
    before, after = re.search(r"loss of PEFT (\S+), fused (\S+);", out).groups()
    assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_trl_sft_trains_the_adapter_in_trl(run, tmp_path):
    folder = cases.save_model(tmp_path / "llama", "llama", chat=True)
    out = run("trl_sft.py", "--model", folder, "--out", tmp_path / "out", "--steps", 3)
    assert len(re.findall(r" -> .* \(expected \d{4}-\d\d-\d\d\)", out)) == 3
    assert_trained(folder, tmp_path / "out" / "adapter")


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_qlora_trainer_learns_on_a_quantised_base(run, base, local_model, tmp_path):
    folder = local_model("llama")
    arguments = ("--model", folder, "--out", tmp_path / "out", "--base", base)
    out = run("qlora_trainer.py", *arguments, "--steps", 20, "--length", 32)
    before, after = re.search(r"held-out loss (\S+) before, (\S+) after 20 steps", out).groups()
    assert float(after) < float(before)
    assert f"│ {base} " in out
    assert_trained(folder, tmp_path / "out" / "adapter")


SCRIPTS = {
    "named_entities": ("bert", [], "F1 of names"),
    "question_answering": ("bert", [], "exact answers"),
    "embeddings": ("bert", ["--batch-size", 16], "nearest signature"),
    "preference": ("llama", [], "better answers"),
    "image_classification": ("vit", [], "accuracy on"),
    "semantic_segmentation": (
        lambda folder: segmentation_cases.save(folder, "backbone"),
        [],
        "mean IoU",
    ),
    "speech": (speech_cases.save_ctc, ["--case", "lower"], "wrong characters"),
    "image_text_retrieval": (
        lambda folder: retrieval_cases.save(folder, "clip"),
        [],
        "mean recall",
    ),
    "vision_chat": (
        lambda folder: vision_chat_cases.save(folder, "idefics3"),
        [],
        "What is drawn? ->",
    ),
}
"""Scripts that train from a recipe: a tiny model, options, and a part of their last lines."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_a_task_trains(name, run, tmp_path):
    model, options, printed = SCRIPTS[name]
    if isinstance(model, str):
        folder = cases.save_model(tmp_path / "m", model, chat=name == "preference")
    else:
        folder = model(tmp_path / "m")
    out = tmp_path / "out"
    text = run(f"{name}.py", "--model", folder, "--out", out, "--steps", 4, *options)
    assert printed in text.splitlines()[-1]
    result = json.loads(next(out.rglob("result.json")).read_text())
    assert (result["status"], result["steps"], result["problems"]) == ("finished", 4, [])


def test_every_script_and_recipe_is_in_the_list():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    recipes = sorted(path.name for path in EXAMPLES.glob("recipes/*.yaml"))
    assert [name for name in (*NAMES, *recipes) if name not in page] == []
    commands = re.findall(r"python examples/(\w+\.py)", page)
    assert sorted(set(commands)) == NAMES


def assert_trained(folder, adapter):
    """Plain PEFT loads the adapter on the model, and each ``lora_B`` has changed from zero."""
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, adapter)
    B = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert len(B) == 14
    assert all(tensor.abs().max() > 0 for tensor in B)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short_and_uses_public_names_only(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert source.count("\n") < 100
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("peftkit"):
            assert node.module == "peftkit"
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("peftkit") for alias in node.names)
    assert imported
    assert imported <= set(peftkit.__all__)
