"""What a run leaves behind, and when it stops: NaN, early stopping, the best model, the checks after training."""

import json
import re

import finetune_cases as cases
import models
import pytest
import torch
import yaml
from export_cases import byte_level
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from peftkit import BottleneckConfig, ContractError, LoraConfig, PrefixConfig, export_gguf, wrap
from peftkit.finetune import generate, train
from peftkit.finetune.outcome import digests, judge
from peftkit.finetune.report import bars


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def values(model, tmp_path, **changes):
    return cases.recipe(model, "sft", cases.chats(16), tmp_path / "run", **changes)


def test_the_folder_of_a_run(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, "sft", data, tmp_path / "run", data={"eval": 0.25})
    )
    result = json.loads(cases.run("train", file, "--json"))
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        *(".lock", "adapter", "checkpoints", "data.json", "environment.json", "metrics.jsonl"),
        *("recipe.yaml", "report.html", "report.md", "result.json", "samples.json"),
    }
    assert result == json.loads((run / "result.json").read_text())
    assert (result["status"], result["steps"], result["problems"]) == ("finished", 4, [])
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["training"]["seq_len"] == 64
    assert resolved["training"]["best_metric"] == "loss"
    assert None not in (resolved["training"]["lr"], resolved["training"]["head_lr"])
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    head, _, card = (
        (run / "adapter" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    )
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "base_model": "../../../" + str(model.relative_to(tmp_path.parent)),
        "tags": ["peftkit", "sft", "lora"],
    }
    assert (run / "adapter" / yaml.safe_load(head)["base_model"] / "config.json").exists()
    for part in ("eval_loss", "12 rows", "4 rows", "transformers 5.", "peftkit.load_adapter"):
        assert part in card
    report = (run / "report.md").read_text()
    for part in ("## Checks", "28 of 28 trained tensors changed", "## Curves", "**before**", "say"):
        assert part in report
    assert (run / "adapter" / "tokenizer.json").exists()
    page = (run / "report.html").read_text()
    for text in (report, page):
        assert re.search(r"to the loaded model: planned [\d.]+ [KM]iB, measured [\d.]+ \w+", text)
    for part in (
        "Training loss",
        "Memory of a training step at its peak",
        "before training",
        "seed",
    ):
        assert part in page


def test_quiet_prints_the_result_alone(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, "sft", data, tmp_path / "run")
    )
    lines = cases.run("train", file, "--quiet").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train_loss", "finished"]


def test_a_nan_stops_the_run_and_names_the_step(model, tmp_path, one_thread, monkeypatch):
    step = Trainer.training_step

    def broken(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(ContractError, match="the loss is nan at step 3, so training stopped"):
        train(values(model, tmp_path))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["steps"], result["weights"]) == ("failed", 2, None)


def test_the_best_checkpoint_is_kept_and_bad_ones_stop_early(model, tmp_path, one_thread):
    found = train(
        values(
            model,
            tmp_path,
            strategy="full",
            data={"eval": 0.25},
            training={
                "max_steps": 30,
                "lr": 0.5,  # so large that each step makes it worse
                "checkpoint_every": 2,
                "early_stopping": 2,
                "keep_checkpoints": 1,
                "scheduler": "constant",
                "samples": 0,
            },
        )
    )
    assert found.steps < 30
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {e["step"]: e["eval_loss"] for e in map(json.loads, lines) if "eval_loss" in e}
    best = min(losses, key=lambda s: losses[s])
    assert found.metrics["eval_loss"] == losses[best] < losses[found.steps]
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"label_smoothing": 0.1},
        {"layer_decay": 0.5, "scheduler": "cosine"},
        {"lora_plus_ratio": 4, "optimizer": "adafactor"},
        {"max_steps": None, "epochs": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_training(changes, model, tmp_path, one_thread):
    found = train(values(model, tmp_path, training={"samples": 0, **changes}))
    assert (found.status, found.problems) == ("finished", [])
    assert found.steps == (2 if "epochs" in changes else 4)


def wide_llama(tokenizer):
    """A tiny Llama whose rows are whole blocks of bitsandbytes."""
    config = models.tiny("llama").config.to_dict()
    config |= {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_a_quantised_base(base, tmp_path, one_thread):
    tokenizer = cases.letter_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path / "m")
    wide_llama(tokenizer).save_pretrained(tmp_path / "m")
    # Evaluations before and between steps must not change what the steps after them do.
    settings = {"samples": 1, "checkpoint_every": 2, "max_steps": 8}
    found = train(
        values(tmp_path / "m", tmp_path, base=base, data={"eval": 0.25}, training=settings)
    )
    assert (found.status, found.problems) == ("finished", [])
    assert len(generate(tmp_path / "run", ["say a"], max_new_tokens=2)) == 1


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize(
    ("strategy", "base"), [("lora", "auto"), ("lora", "nf4"), ("full", "auto")]
)
def test_a_model_in_a_gguf_file(strategy, base, tmp_path, one_thread):
    tokenizer = byte_level("smollm")
    tokenizer.chat_template = cases.CHAT_TEMPLATE
    export_gguf(wide_llama(tokenizer), tmp_path / "m.gguf", tokenizer=tokenizer, dtype="f32")
    settings = values(tmp_path / "m.gguf", tmp_path, strategy=strategy, base=base)
    found = train(settings | {"training": settings["training"] | {"seq_len": 64, "lr": 1e-3}})
    assert (found.status, found.problems) == ("finished", [])
    assert len(generate(tmp_path / "run", ["say a"], max_new_tokens=4)) == 1


def test_evaluation_of_a_share_needs_the_same_rows(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    train(cases.recipe(model, "sft", data, tmp_path / "run", data={"eval": 0.25}))
    cases.write_jsonl(data, cases.chats(20))
    assert "is not known; name rows with --data" in cases.run("eval", tmp_path / "run", code=1)


def test_training_that_changes_nothing_is_a_problem(model, tmp_path, one_thread):
    # bfloat16 weights of 0.1 do not change by 1e-12.
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    settings = {"lr": 1e-12, "head_lr": 1e-12, "samples": 0, "max_steps": 1}
    file = cases.write_recipe(
        tmp_path / "r.yaml",
        cases.recipe(
            model, "sft", data, tmp_path / "run", strategy="full", base="bf16", training=settings
        ),
    )
    printed = cases.run("train", file, code=1)
    assert "error: training changed none of the 21 trained tensors" in printed
    assert "**problem**" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2), BottleneckConfig(), PrefixConfig(gate=True)],
    ids=lambda c: str(c.peft_type),
)
def test_an_adapter_that_stayed_zero_is_a_problem(config):
    wrapped = wrap(models.tiny("llama"), config)
    before = digests(wrapped)
    problems, _ = judge(wrapped, before, is_adapter=True)
    assert len(problems) == 2
    assert problems[0].startswith("training changed none of the")
    assert problems[1].startswith("the adapter is zero")
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert judge(wrapped, before, is_adapter=True)[0] == []
    with torch.no_grad():
        next(p for p in wrapped.parameters() if p.requires_grad).fill_(float("nan"))
    assert "1 of" in judge(wrapped, before, is_adapter=True)[0][0]


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(model, tmp_path, one_thread):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = values(model, tmp_path, training={"seed": seed, "samples": 0})
        train(settings | {"out": str(tmp_path / name)})
        weights[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weights["a"][n], weights["b"][n]) for n in weights["a"])
    assert not all(torch.equal(weights["a"][n], weights["c"][n]) for n in weights["a"])


def test_curves_as_text():
    assert bars([0.0, 1.0, 2.0, 3.5]) == "▁▃▅█"
    assert len(bars(list(range(500)))) == 40
    assert bars([1.0, 1.0]) == "▁▁"
    assert bars([float("nan"), 0.0, 1.0, float("inf")]) == "?▁█?"


def test_a_run_that_cannot_be_planned_says_why(model, tmp_path, one_thread):
    lines = []
    train(values(model, tmp_path, training={"optimizer": "adagrad"}), say=lines.append)
    assert "memory is not planned: training.optimizer=adagrad cannot be planned" in lines
    assert any(
        line.startswith("memory that training adds to the loaded model: measured") for line in lines
    )
