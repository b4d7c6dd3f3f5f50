"""Several adapters with their own tasks and rows in one run: each ends as in a run of its own."""

import json

import finetune_cases as cases
import pytest
from joint_cases import LR, assert_same_run
from safetensors.torch import load_file

from peftkit import ContractError, read_recipe, train
from peftkit.finetune.together.recipe import AdaptersRecipe

TRAINING = {"checkpoint_every": 3, "batch_size": 3, "samples": 0, "lr": LR, "log_every": 1}


def sft_recipe(tmp_path, **changes):
    """Two adapters with rows of different lengths, numbers of rows in a batch, accumulation and numbers of steps."""
    model = cases.save_model(tmp_path / "model", "llama", chat=True)
    longer = [
        {"prompt": f"write {c} five times please", "completion": c * 5} for c in "abcdefghijklmnop"
    ]
    return {
        "model": str(model),
        "task": "sft",
        "strategy": {"name": "lora", "r": 4},
        "training": TRAINING | {"max_steps": 5},
        "adapters": {
            "short": {"data": {"train": str(cases.write_jsonl(tmp_path / "a.jsonl", cases.chats(16))), "eval": 0.25}},
            "long": {
                "data": {"train": str(cases.write_jsonl(tmp_path / "b.jsonl", longer)), "eval": 0.25},
                "strategy": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
                "training": {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 2, "lr": 3e-3},
            },
        },
        "out": str(tmp_path / "out"),
    } | changes  # fmt: skip


def alone(recipe, name, tmp_path):
    """The run of one adapter by itself."""
    own = read_recipe(recipe).adapters[name].to_dict()
    return train(own | {"out": str(tmp_path / f"alone {name}")})


def test_adapters_with_their_own_rows_end_as_in_runs_of_their_own(
    tmp_path, joint_sizes, one_thread
):
    recipe = sft_recipe(tmp_path)
    result = train(recipe)
    assert (result.status, result.problems, result.steps) == ("finished", [], 5)
    # Six forwards of the one with accumulation beside five of the other, whose last step it accompanies.
    assert joint_sizes == [2, 2, 2, 2, 2, 1]
    for name in ("short", "long"):
        assert_same_run(tmp_path / "out" / name, alone(recipe, name, tmp_path).folder)
    assert {"short/eval_loss", "long/eval_loss"} <= result.metrics.keys()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| [long](long/report.md) | sft |" in report
    assert "has several adapters; name the folder of one" in cases.run(
        "eval", tmp_path / "out", code=1
    )
    assert "loss:" in cases.run("eval", tmp_path / "out" / "long")
    again = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert isinstance(again, AdaptersRecipe)
    assert again.to_dict() == json.loads(json.dumps(again.to_dict()))
    assert again.adapters["long"].training.max_steps == 3


@pytest.mark.parametrize("base", ["auto", "int8"])
def test_different_tasks_have_their_own_heads_on_one_backbone(
    base, tmp_path, joint_sizes, one_thread
):
    model = cases.save_model(tmp_path / "model", "masked bert")
    texts = [{"text": c * 4, "label": "low" if c < "m" else "high"} for c in "abcdefstuvwx"]
    recipe = {
        "model": str(model),
        "base": base,
        "strategy": {"name": "lora", "r": 2},
        "training": TRAINING | {"max_steps": 3},
        "adapters": {
            "names": {
                "task": "token_classification",
                "data": {"train": str(cases.write_jsonl(tmp_path / "n.jsonl", cases.tagged(12)))},
            },
            "words": {
                "task": "masked_lm",
                "data": {"train": str(cases.write_jsonl(tmp_path / "w.jsonl", texts))},
            },
        },
        "out": str(tmp_path / "out"),
    }
    result = train(recipe)
    assert (result.status, result.problems) == ("finished", [])
    assert set(joint_sizes) == {2}
    for name in ("names", "words"):
        assert_same_run(tmp_path / "out" / name, alone(recipe, name, tmp_path).folder)
    heads = load_file(tmp_path / "out" / "names" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in heads


def test_a_stopped_run_continues(tmp_path, one_thread):
    recipe = sft_recipe(tmp_path)
    whole = train(recipe)
    file = cases.write_recipe(tmp_path / "r.yaml", recipe | {"out": str(tmp_path / "second")})
    cases.run("train", file, "adapters.short.training.stop_after=4", "--quiet", code=3)
    folders = [tmp_path / "second" / name / "result.json" for name in ("short", "long")]
    statuses = [json.loads(file.read_text())["status"] for file in folders]
    assert statuses == ["stopped", "finished"]
    assert "already has a run" in cases.run("train", file, code=1)
    changed = cases.run("train", file, "resume=true", "adapters.short.training.lr=1e-3", code=1)
    assert "adapters.short.training.lr: 0.01 before, 0.001 now" in " ".join(changed.split())
    cases.run("train", file, "resume=true", "--quiet")
    for name in ("short", "long"):
        ours, theirs = (
            load_file(folder / name / "adapter" / "adapter_model.safetensors")
            for folder in (tmp_path / "second", whole.folder)
        )
        for tensor in theirs:
            # After the other adapter has ended, steps have fewer rows, so sums have another order.
            assert (ours[tensor] - theirs[tensor]).abs().max() < 0.02 * LR
    assert "is finished" in cases.run("train", file, "resume=true", code=1)


def test_backbones_that_differ_are_refused(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "model", "bert")
    rows = cases.write_jsonl(tmp_path / "t.jsonl", [{"text": c, "label": c} for c in "abab" * 3])
    names = cases.write_jsonl(tmp_path / "n.jsonl", cases.tagged(12))
    recipe = {
        "model": str(model),
        "training": TRAINING | {"max_steps": 2},
        "adapters": {
            "texts": {"task": "text_classification", "data": {"train": str(rows)}},
            "names": {"task": "token_classification", "data": {"train": str(names)}},
        },
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(ContractError, match=r"(?s)backbones of .* differ in 2 weights.*pooler"):
        train(recipe)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_one_adapter_is_found_before_any_is_trained(tmp_path, one_thread):
    recipe = sft_recipe(tmp_path)
    recipe["adapters"]["long"]["strategy"]["target_modules"] = ["nothing"]
    with pytest.raises(ContractError, match="nothing"):
        train(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"one": {}}}, "must have two or more adapters"),
        ({"adapters": {"a/b": {}, "c": {}}}, "which is the name of a folder too"),
        ({"adapters": {"a": {"datas": {}}, "b": {}}}, "adapter a: adapters.a.datas={}: there is no such key"),
        ({"adapters": {"a": {}, "b": {}}}, "adapter a: the recipe has no data.train"),
        ({"stages": [{}, {}]}, "the recipe has stages and adapters"),
        ({"strategy": "full"}, "use lora"),
        ({"adapter": "x"}, "adapter='x': there is no such key"),
        ({"task": "causal_lm", "adapters": {n: {"task": "sft"} for n in "ab"}}, "but each of them has its own task"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_trained_together_are_refused(changes, message, tmp_path):
    recipe = sft_recipe(tmp_path)
    if "strategy" in changes:
        del recipe["adapters"]["long"]["strategy"]
    with pytest.raises(ContractError, match=message):
        train(recipe | changes)


def test_adapters_share_one_precision(tmp_path):
    recipe = sft_recipe(tmp_path)
    recipe["adapters"]["long"]["training"]["gradient_checkpointing"] = True
    with pytest.raises(
        ContractError,
        match=r"adapter long: training\.gradient_checkpointing=True, but short has False",
    ):
        read_recipe(recipe)


def test_options_of_the_default_strategy_are_those_of_an_adapter(tmp_path):
    found = read_recipe(
        sft_recipe(tmp_path), ["adapters.short.strategy.lora_alpha=7", "training.epochs=1"][:1]
    )
    assert [r.strategy.options.r for r in found.adapters.values()] == [4, 2]
    assert found.adapters["short"].strategy.options.lora_alpha == 7
    with pytest.raises(ContractError, match="no adapter 'shorts'"):
        read_recipe(sft_recipe(tmp_path / "other"), ["adapters.shorts.training.lr=1"])
