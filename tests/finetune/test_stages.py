"""Recipes with stages: what is carried from one to the next, resuming in any of them, and contradictions."""

import json
from pathlib import Path

import finetune_cases as cases
import pytest
import torch
import yaml
from markers import slow_if
from safetensors.torch import load_file

import peftkit.finetune.trainer as trainer_module
from peftkit import ContractError
from peftkit.finetune import evaluate, generate, read_recipe, train
from peftkit.finetune.run_folder import REPORT

TEXTS = [{"text": "abc abc abc"}, {"text": "xyz xyz"}, {"text": "bca bca bca"}] * 6
LABELLED = [{"text": c * 4, "label": "low" if c < "m" else "high"} for c in "abcdefstuvwx"]
OTHER = [{"text": c, "label": c} for c in "abab"]
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.2}
MIX = {"name": "mix", "lora": {"r": 2}, "prefix": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "masked bert")


def values(model, tmp_path, out="run", first=LORA, second=LORA, carry=None):
    """Texts without labels first, then texts with labels."""
    texts = cases.write_jsonl(tmp_path / "t.jsonl", TEXTS)
    labelled = cases.write_jsonl(tmp_path / "l.jsonl", LABELLED)
    second_stage = {
        "task": "text_classification",
        "strategy": second,
        "data": {"train": str(labelled), "eval": 0.25},
    }
    return {
        "model": str(model),
        "training": {"max_steps": 5, "batch_size": 4, "log_every": 1, "lr": 1e-2}
        | {"checkpoint_every": 2},
        "stages": [
            {
                "task": "masked_lm",
                "strategy": first,
                "data": {"train": str(texts)},
                "training": {"max_steps": 4},
            },
            second_stage | ({"carry": carry} if carry else {}),
        ],
        "out": str(tmp_path / out),
    }


def weights(folder):
    (file,) = folder.glob("adapter/*model.safetensors")
    return load_file(file)


def differences(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not first[name].equal(second[name])]


def test_two_stages_leave_a_folder_each_and_one_report(model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path))
    printed = cases.run("train", file)
    assert "stage 2 of 2: text_classification" in printed
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        *("1-masked_lm", "2-text_classification", "recipe.yaml", "report.md", "result.json"),
        ".lock",
    }
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["steps"], result["problems"]) == ("finished", 9, [])
    assert [stage["steps"] for stage in result["stages"]] == [4, 5]
    assert Path(result["weights"]) == run / "2-text_classification" / "adapter"
    report = (run / REPORT).read_text()
    for part in ("1-masked_lm/report.md", "the adapter of the stage before", "eval_accuracy"):
        assert part in report
    assert read_recipe(run / "recipe.yaml").to_dict() == read_recipe(file).to_dict()
    assert evaluate(run)["accuracy"] == result["metrics"]["eval_accuracy"]
    assert "which writes no text" in cases.run("generate", run, "x", code=1)
    assert "already has a run" in cases.run("train", file, code=1)
    assert "is finished" in cases.run("train", file, "resume=true", code=1)


def first_step(monkeypatch, wanted):
    """Record the adapted model's weights before the first step of the stage ``wanted``."""
    seen = {}
    step = trainer_module.RecipeTrainer.training_step

    def record(self, model, *args, **kwargs):
        if self.task.name == wanted and not seen:
            seen.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", record)
    return seen


def test_the_adapter_is_carried_and_the_head_is_new(model, tmp_path, one_thread, monkeypatch):
    seen = first_step(monkeypatch, "text_classification")
    found = train(values(model, tmp_path))
    before = weights(tmp_path / "run" / "1-masked_lm")
    body = [name for name in before if ".encoder." in name]
    assert len(body) == 24
    for name in body:
        own = name.replace(".weight", ".default.weight")
        assert torch.equal(seen[own], before[name]), name
    assert any("24 tensors of the adapter carried over" in note for note in found.notes)
    assert any("new: " in note and "classifier" in note for note in found.notes)


def test_a_mix_is_carried(model, tmp_path, one_thread, monkeypatch):
    seen = first_step(monkeypatch, "text_classification")
    train(values(model, tmp_path, first=MIX, second=MIX))
    before = weights(tmp_path / "run" / "1-masked_lm")
    values_before = {tuple(t.flatten().tolist()) for n, t in before.items() if ".encoder." in n}
    values_now = {tuple(t.flatten().tolist()) for t in seen.values()}
    assert values_before <= values_now


@pytest.mark.parametrize(("first", "second"), [("full", "full"), (LORA, "full"), ("full", LORA)])
def test_the_body_is_carried(first, second, model, tmp_path, one_thread, monkeypatch):
    seen = first_step(monkeypatch, "text_classification")
    train(values(model, tmp_path, first=first, second=second))
    folder = tmp_path / "run" / "1-masked_lm" / ("model" if first == "full" else "merged")
    before = load_file(folder / "model.safetensors")
    original = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    now = seen.get(name, seen.get(f"base_model.model.{name}".replace("dense", "dense.base_layer")))
    assert torch.equal(now, before[name])
    assert not torch.equal(now, original[name])


def test_a_merged_stage_has_the_function_of_its_adapter(model, tmp_path, one_thread):
    from transformers import AutoModelForMaskedLM

    from peftkit import load_adapter

    train(values(model, tmp_path, second={"name": "bottleneck", "reduction_factor": 4}))
    stage = tmp_path / "run" / "1-masked_lm"
    ids = torch.arange(10, 30)[None]
    merged = AutoModelForMaskedLM.from_pretrained(stage / "merged").eval()
    base = AutoModelForMaskedLM.from_pretrained(model)
    untrained = base.eval()(input_ids=ids).logits
    adapted = load_adapter(base, stage / "adapter").eval()
    wanted = adapted(input_ids=ids).logits
    # One rounding of each merged weight against two products of the adapter: as near as 32 bits are, over some hundred additions.
    error = (merged(input_ids=ids).logits - wanted).abs().max()
    assert error <= 256 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert (untrained - wanted).abs().max() > 100 * error


@pytest.mark.parametrize("carry", slow_if("merge".__eq__, ["adapter", "merge"]))
def test_a_run_that_died_in_any_stage_equals_an_uninterrupted_one(
    carry, model, tmp_path, one_thread, monkeypatch
):
    train(values(model, tmp_path, "whole", carry=carry))
    step = trainer_module.RecipeTrainer.training_step
    parts = values(model, tmp_path, "parts", carry=carry)
    resume = False
    for task, number in (("masked_lm", 3), ("text_classification", 0), ("text_classification", 3)):

        def dies(self, *args, task=task, number=number, **kwargs):
            if (self.task.name, self.state.global_step) == (task, number):
                raise MemoryError
            return step(self, *args, **kwargs)

        monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", dies)
        with pytest.raises(MemoryError):
            train(parts | {"resume": resume})
        resume = True
    monkeypatch.undo()
    assert "is not finished" in cases.run("eval", tmp_path / "parts", code=1)
    found = train(parts | {"resume": True})
    assert (found.status, found.steps) == ("finished", 9)
    for stage in ("1-masked_lm", "2-text_classification"):
        pair = [weights(tmp_path / run / stage) for run in ("whole", "parts")]
        assert differences(*pair) == []


def test_a_stage_that_was_stopped_goes_on(model, tmp_path, one_thread):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path))
    printed = cases.run("train", file, "stages.2.training.stop_after=3", code=3)
    assert "stopped after step 3" in printed
    assert "resuming from checkpoint-3" in cases.run("train", file, "resume=true")
    other = cases.run("train", file, "resume=true", "stages.1.training.lr=1e-3", code=1)
    assert "stages.1.training.lr: 0.01 before, 0.001 now" in other


def test_the_same_task_twice_keeps_its_head(tmp_path, one_thread, monkeypatch):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    seen = {}
    step = trainer_module.RecipeTrainer.training_step

    def record(self, model, *args, **kwargs):
        seen[self.args.output_dir] = {n: p.detach().clone() for n, p in model.named_parameters()}
        return step(self, model, *args, **kwargs)

    recipe = {
        "model": str(model),
        "task": "sft",
        "training": {"max_steps": 1, "batch_size": 4, "samples": 1},
        "stages": [{"data": {"train": cases.chats(n)}} for n in (8, 12)],
        "out": str(tmp_path / "run"),
    }
    monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", record)
    train(recipe)
    trained = weights(tmp_path / "run" / "1-sft")
    begun = seen[str(tmp_path / "run" / "2-sft" / "checkpoints")]
    assert all(
        torch.equal(begun[name.replace(".weight", ".default.weight")], tensor)
        for name, tensor in trained.items()
    )
    assert len(generate(tmp_path / "run", ["say a"], max_new_tokens=2)) == 1


FAULTS = {
    "one stage": (lambda v: v["stages"].pop(), "must be a list of two or more stages"),
    "unknown key": (
        lambda v: v["stages"][1].update(carri="merge"),
        "stage 2: stages.2.carri='merge': there is no such key; did you mean 'stages.2.carry'",
    ),
    "key of the run in a stage": (
        lambda v: v["stages"][0].update(model="x"),
        "stages.1.model='x': there is no such key",
    ),
    "unknown carry": (
        lambda v: v["stages"][1].update(carry="adaptor"),
        "stages.2.carry='adaptor' is unknown; did you mean 'adapter'",
    ),
    "carry in the first stage": (
        lambda v: v["stages"][0].update(carry="adapter"),
        "there is no stage before the first",
    ),
    "adapter of another strategy": (
        lambda v: v["stages"][1].update(carry="adapter", strategy={"name": "lora", "r": 8}),
        "stages.2.carry='adapter', but the strategies differ",
    ),
    "adapter after full tuning": (
        lambda v: (v["stages"][0].update(strategy="full"), v["stages"][1].update(carry="merge")),
        "which trains the model itself and no adapter",
    ),
    "weights after an adapter": (
        lambda v: v["stages"][1].update(carry="weights"),
        "which trains an adapter; use adapter or merge",
    ),
    "prefix merged": (
        lambda v: v["stages"][0].update(strategy="prefix"),
        "the stage before trains prefix, which cannot be merged",
    ),
    "adapter on a changed base": (
        lambda v: [s.update(strategy={"name": "lora", "init_lora_weights": "pissa"}) for s in v["stages"]],
        "init_lora_weights='pissa' changes the weights of the base model",
    ),
    "unused default": (lambda v: v.update(task="masked_lm"), "but each of them has its own task"),
    "other classes": (
        lambda v: [
            s.update(strategy="full", task="text_classification", data={"train": rows})
            for s, rows in zip(v["stages"], (LABELLED, OTHER), strict=True)
        ],
        "the classes are a, b, but the head of the stage before has high, low",
    ),
    "fault of a stage": (
        lambda v: v["stages"][1]["data"].update(train="/nowhere.jsonl"),
        "stage 2 (text_classification): data.train='/nowhere.jsonl' does not exist",
    ),
    "epochs and steps of a stage": (
        lambda v: v["stages"][1].update(training={"epochs": 1, "max_steps": 2}),
        "stage 2 (text_classification): training.epochs=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_contradictions_are_named_before_anything_is_written(fault, model, tmp_path, one_thread):
    change, expected = FAULTS[fault]
    recipe = values(model, tmp_path)
    change(recipe)
    with pytest.raises(ContractError) as error:
        train(recipe)
    assert expected in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_domain_adaptation_runs(model, tmp_path, one_thread):
    texts = tmp_path / "notes"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(24)))
    labelled = tmp_path / "notes.csv"
    rows = [f"{row['text']},{row['label']}" for row in LABELLED * 2]
    labelled.write_text("\n".join(["text,label", *rows]) + "\n")
    changes = [f"model={model}", "training.seq_len=64", "training.batch_size=4"]
    changes += [f"out={tmp_path / 'run'}", f"stages.1.data.train={texts}"]
    changes += [f"stages.2.data.train={labelled}"]
    changes += [f"stages.{n}.training={{max_steps: 4}}" for n in (1, 2)]
    file = Path(__file__).parents[2] / "examples" / "recipes" / "domain_adaptation.yaml"
    cases.run("train", file, *changes, "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])


def test_overrides_of_stages(model, tmp_path):
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path))
    found = read_recipe(file, ["stages.1.task.mask_share=0.3", "training.seed=7"])
    assert found.stages[0].recipe.task.options.mask_share == 0.3
    assert [stage.recipe.training.seed for stage in found.stages] == [7, 7]
    # The length of a stage replaces the default length.
    longer = read_recipe(file, ["stages.2.training.epochs=2"]).stages[1].recipe.training
    assert (longer.epochs, longer.max_steps) == (2, None)
    for override, expected in (
        ("stages.3.training.lr=1", "stages has the entries 1 to 2"),
        ("stages.1=x", "write stages.NUMBER.KEY=VALUE"),
    ):
        with pytest.raises(ContractError, match=expected):
            read_recipe(file, [override])


def test_an_adapter_can_be_trained_further_by_another_run(model, tmp_path, one_thread, monkeypatch):
    recipe = cases.recipe(model, "text_classification", LABELLED, tmp_path / "a", strategy=LORA)
    train(recipe)
    seen = first_step(monkeypatch, "text_classification")
    train(recipe | {"out": str(tmp_path / "b"), "adapter": str(tmp_path / "a" / "adapter")})
    head = "base_model.model.classifier.weight"
    trained = weights(tmp_path / "a")[head]
    # The classes are the same, so the head is kept.
    assert any(torch.equal(p, trained) for n, p in seen.items() if n.endswith("default.weight"))
    assert yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())["adapter"]
    assert evaluate(tmp_path / "b", LABELLED)["loss"] > 0
    for changes, expected in (
        ({"strategy": "full"}, "trains no adapter"),
        ({"strategy": {"name": "lora", "r": 8}}, "other shapes"),
        ({"adapter": str(tmp_path)}, "has no adapter_model.safetensors"),
    ):
        wrong = recipe | {"out": str(tmp_path / "c"), "adapter": str(tmp_path / "a" / "adapter")}
        with pytest.raises(ContractError, match=expected):
            train(wrong | changes)
        assert not (tmp_path / "c").exists()


def test_options_of_the_default_task_count_where_a_stage_has_the_same_one(tmp_path):
    recipe = {
        "model": "m",
        "task": {"name": "masked_lm", "mask_share": 0.3, "whole_word": True},
        "distill": {"teacher": "t"},
        "data": {"train": "rows.jsonl"},
        "stages": [
            {"task": {"mask_share": 0.2}, "distill": None},
            {"task": "text_classification"},
        ],
        "out": str(tmp_path),
    }
    first, second = (stage.recipe for stage in read_recipe(recipe).stages)
    assert (first.task.name, first.task.options.mask_share) == ("masked_lm", 0.2)
    assert first.task.options.whole_word
    assert second.task.name == "text_classification"
    assert (first.distill, second.distill.teacher) == (None, "t")
