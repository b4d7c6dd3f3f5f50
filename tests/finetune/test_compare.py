"""Comparisons: baselines, one table, and warnings when adaptation loses to something simpler or forgets."""

import json

import finetune_cases as cases
import pytest

from peftkit import ContractError
from peftkit.finetune import compare, read_recipe, train
from peftkit.finetune.comparison.comparing import Row
from peftkit.finetune.comparison.entries import make_entries
from peftkit.finetune.comparison.report import warnings_of
from peftkit.finetune.comparison.source import source_losses, source_values
from peftkit.finetune.comparison.worker import run_entry

LABELLED = [{"text": c * 4, "label": "low" if c < "m" else "high"} for c in "abcdefstuvwx"] * 2
TEXTS = [{"text": "abc abc abc"}, {"text": "xyz xyz"}, {"text": "bca bca bca"}] * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "masked bert")


def values(model, tmp_path, task="text_classification", rows=LABELLED, **changes):
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    training = {"max_steps": 6, "batch_size": 8, "checkpoint_every": 6}
    return cases.recipe(
        model, task, data, tmp_path / "out", data={"eval": 0.25}, training=training, **changes
    )


def test_the_command_writes_one_table(model, tmp_path, one_thread):
    texts = cases.write_jsonl(tmp_path / "t.jsonl", TEXTS)
    file = cases.write_recipe(tmp_path / "r.yaml", values(model, tmp_path))
    strategies = "[{name: full, lr: 5.0}]"  # large enough to forget everything
    options = ("--strategies", strategies, "--source", texts, "--forget-limit", 0.02)
    printed = cases.run("compare", file, *options)
    assert "the head is new, so it is trained alone instead" in printed
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["probe", "scratch", "full"]
    assert found["metric"] == "eval_accuracy"
    rows = {row["name"]: row for row in found["rows"]}
    assert 0 < rows["probe"]["trained"] < rows["full"]["trained"] == rows["scratch"]["trained"]
    assert all(row["peak_mib"] > 0 and row["seconds"] > 0 for row in found["rows"])
    # A probe changes no weight that the loss of the source data depends on.
    assert rows["probe"]["source_after"] == rows["probe"]["source_before"]
    assert rows["full"]["source_before"] == rows["probe"]["source_before"]
    assert rows["full"]["forgotten"] > found["forget_limit"] == 0.02
    assert rows["scratch"]["source_after"] is None
    assert any(
        line.startswith("full forgets: the loss on the source") for line in found["warnings"]
    )
    report = (tmp_path / "out" / "report.md").read_text()
    for part in ("| probe |", "| scratch |", "source after", "**full forgets", "same for each row"):
        assert part in report
    assert "already has a run" not in cases.run("eval", tmp_path / "out" / "full")
    assert "is not empty" in cases.run("compare", file, code=1)


def entries(recipe, *strategies):
    return {entry.name: entry for entry in make_entries(recipe, strategies)}


@pytest.mark.parametrize("base", ["auto", "nf4"])
def test_the_pretrained_model_is_measured_if_it_has_a_head(base, model, tmp_path, one_thread):
    found = entries(values(model, tmp_path, "masked_lm", TEXTS, base=base), "lora")
    zero = run_entry(found["pretrained"], None)
    assert zero["trained"] == 0
    # The loss before the first step is that of the pretrained model.
    recipe = found["lora"].values
    training = recipe["training"] | {"max_steps": 1, "lr": 1e-12, "checkpoint_every": 1}
    run = train(recipe | {"training": training, "out": str(tmp_path / "still")})
    assert zero["metrics"]["eval_loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-6)
    without = entries(values(model, tmp_path), "lora")["pretrained"]
    assert any("classifier" in name for name in run_entry(without, None)["new_head"])


def test_scratch_starts_from_random_weights_of_the_same_shape(model, tmp_path, one_thread):
    given = values(model, tmp_path)
    given["training"]["lr"] = 1e-4
    recipe = read_recipe(entries(given, "full")["scratch"].values)
    assert (recipe.weights, recipe.strategy.name) == ("random", "full")
    found = train(recipe)
    assert found.problems == []
    from safetensors.torch import load_file

    before = load_file(model / "model.safetensors")
    after = load_file(found.weights / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert before[name].shape == after[name].shape
    # Adam moves a weight by at most the rate in a step; the pretrained ones differ by far more.
    assert (before[name] - after[name]).abs().max() > 10 * 6 * recipe.training.lr
    assert "weights: random" in (found.folder / "recipe.yaml").read_text()
    with pytest.raises(ContractError, match="weights='random' with strategy lora"):
        read_recipe(values(model, tmp_path, weights="random"))


@pytest.mark.parametrize(
    "strategy", ["full", "lora", {"name": "bottleneck", "reduction_factor": 4}, "prefix"]
)
def test_the_source_loss_is_that_of_the_trained_body(strategy, model, tmp_path, one_thread):
    recipe = read_recipe(values(model, tmp_path, strategy=strategy))
    train(recipe)
    found = source_losses(source_values(recipe, TEXTS, None), recipe)
    assert found["source_after"] != found["source_before"]
    if strategy == "lora":
        return
    # Trained as a masked model on the source data itself, the loss falls.
    own = read_recipe(
        values(model, tmp_path, "masked_lm", TEXTS * 4, strategy=strategy)
        | {"out": str(tmp_path / "own")}
    )
    train(own)
    better = source_losses(source_values(own, TEXTS, None), own)
    assert better["source_before"] == found["source_before"]
    assert better["source_after"] < better["source_before"]


def test_full_tuning_beside_adapters_on_a_quantised_base_is_measured_on_the_source(
    model, tmp_path, one_thread
):
    recipe = values(model, tmp_path, strategy="lora", base="int8")
    source = source_values(read_recipe(recipe), TEXTS, None)
    found = {name: run_entry(entries(recipe, name)[name], source) for name in ("full", "lora")}
    assert found["full"]["source_after"] != found["full"]["source_before"]
    assert found["full"]["source_before"] != found["lora"]["source_before"]


def test_a_backbone_without_a_head_cannot_measure_the_source(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    recipe = read_recipe(values(model, tmp_path))
    with pytest.raises(ContractError, match="no tensors for these weights of BertForMaskedLM"):
        source_losses(source_values(recipe, TEXTS, None), None)


def test_stages_are_compared_with_their_last_stage_alone(model, tmp_path, one_thread):
    texts = cases.write_jsonl(tmp_path / "t.jsonl", TEXTS)
    data = cases.write_jsonl(tmp_path / "d.jsonl", LABELLED)
    recipe = {
        "model": str(model),
        "training": {"max_steps": 3, "batch_size": 4, "lr": 1e-2},
        "stages": [
            {"task": "masked_lm", "data": {"train": str(texts)}},
            {"task": "text_classification", "data": {"train": str(data), "eval": 0.25}},
        ],
        "out": str(tmp_path / "out"),
    }
    found = entries(recipe, "full", "lora")
    assert list(found) == [
        *("pretrained", "probe", "scratch"),
        *("full", "stages, full", "lora", "stages, lora"),
    ]
    assert found["stages, lora"].partner == "lora"
    alone, staged = (read_recipe(found[name].values) for name in ("lora", "stages, lora"))
    assert alone.task.name == "text_classification"
    assert [stage.recipe.strategy.name for stage in staged.stages] == ["lora", "lora"]
    assert staged.stages[1].carry == "adapter"
    assert read_recipe(found["stages, full"].values).stages[1].carry == "weights"
    source = source_values(staged.as_first(-1), TEXTS, None)
    measured = run_entry(found["stages, lora"], source)
    assert measured["source_after"] != measured["source_before"]
    assert 0 <= measured["metrics"]["eval_accuracy"] <= 1


def row(name, kind, quality, before=None, after=None, partner=None):
    return Row(name, kind, quality, {}, 1.0, None, 1, before, after, [], partner)


def test_warnings_say_what_loses():
    rows = [
        row("pretrained", "pretrained", 0.5),
        row("scratch", "scratch", 0.7),
        row("full", "strategy", 0.6, 2.0, 2.3),
        row("stages, full", "stages", 0.55, 2.0, 2.1, "full"),
        row("lora", "strategy", 0.8, 2.0, 2.19),
    ]
    found = warnings_of(rows, "eval_accuracy", True, 0.1)
    starts = [line.partition(":")[0] for line in found]
    assert starts == [
        "full loses to training the same architecture from scratch",
        "full forgets",
        "stages, full loses to training the same architecture from scratch",
        "stages, full loses to full, which leaves out the stages before the last",
    ]
    assert "rose by 15.0%, from 2 to 2.3, and the limit is 10%" in found[1]
    losses = warnings_of(rows, "eval_loss", False, 1.0)
    assert [line.partition(":")[0] for line in losses] == [
        "full loses to the pretrained model as it is",
        "stages, full loses to the pretrained model as it is",
        "lora loses to the pretrained model as it is",
        "lora loses to training the same architecture from scratch",
    ]
    assert warnings_of(rows[:2], "eval_accuracy", True, 0.1) == []


def test_wrong_arguments_are_named(model, tmp_path):
    good = values(model, tmp_path)
    for recipe, strategies, options, expected in (
        (good | {"data": {"train": "x.jsonl"}}, ["lora"], {}, "needs an evaluation; add data.eval"),
        (good, [], {}, "name at least one"),
        (good, ["lorra"], {}, "did you mean 'lora'"),
        (good, [{"r": 8}], {}, "write a name, or"),
        (good, [{"name": "lora", "rank": 8}], {}, "lora: strategy.rank=8: there is no such key"),
        (good, ["lora"], {"forget_limit": -1}, "forget_limit=-1 is negative"),
        (good, ["lora"], {"source_task": "sft"}, "source_task='sft' without source"),
    ):
        with pytest.raises(ContractError) as error:
            compare(recipe, strategies, **options)
        assert expected in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(model, tmp_path, one_thread):
    from peftkit.finetune.comparison.worker import measure

    recipe = values(model, tmp_path) | {"model": str(tmp_path / "nowhere")}
    with pytest.raises(ContractError, match=r"lora: .*nowhere"):
        measure(entries(recipe, "lora")["lora"], None)
