"""Sweeps: adapters that are trained together end as those that are trained alone, and a fault of one is not that of others."""

import json

import finetune_cases as cases
import pytest
import torch
import yaml
from joint_cases import LR, assert_same_run
from safetensors.torch import load_file

from peftkit import ContractError, sweep, train
from peftkit.finetune.together import base, passes
from peftkit.finetune.together.over import read_over, variants
from peftkit.finetune.together.running import require_together

LABELLED = [{"text": c * 4, "label": "low" if c < "m" else "high"} for c in "abcdefstuvwx"] * 2
PAIRS = [{"source": f"say {c}", "target": c * 3} for c in "abcdefgh"] * 2
TRAINING = {"max_steps": 5, "checkpoint_every": 3, "batch_size": 3, "samples": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
            found[name] = cases.save_model(folder, name, chat=name == "llama")
        return found[name]

    return make


def values(models, tmp_path, name="llama", task="sft", rows=None, **changes):
    training = TRAINING | changes.pop("training", {})
    file = cases.write_jsonl(tmp_path / "rows.jsonl", cases.chats(24) if rows is None else rows)
    data = changes.pop("data", {"eval": 0.25})
    return cases.recipe(
        models(name), task, file, tmp_path / "out", training=training, data=data, **changes
    )


def assert_equals_a_run_alone(row, recipe, tmp_path):
    """A run of a sweep equals a run of ``train``."""
    own = [f"{name}={json.dumps(value)}" for name, value in row.values.items()]
    alone = train(recipe | {"out": str(tmp_path / f"alone {row.name}")}, *own)
    assert_same_run(row.folder, alone.folder)
    assert row.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6)


def test_adapters_end_as_in_runs_of_their_own(models, tmp_path, joint_sizes, one_thread):
    recipe = values(models, tmp_path, training={"samples": 1, "sample_tokens": 4})
    found = sweep(recipe, {"strategy.r": [2, 5], "training.lr": [LR, 3e-3]})
    assert set(joint_sizes) == {4}
    assert [row.status for row in found.rows] == ["finished"] * 4
    losses = [row.quality for row in found.rows]
    assert losses == sorted(losses)
    assert found.best == found.rows[0].name
    rows = {row.name: row for row in found.rows}
    for name in ("r=2,lr=0.01", "r=5,lr=0.003"):
        assert_equals_a_run_alone(rows[name], recipe, tmp_path)
    report = (found.folder / "report.md").read_text()
    assert f"The best run is **{found.best}**" in report
    written = json.loads((found.folder / "sweep.json").read_text())
    assert written["over"] == {"strategy.r": [2, 5], "training.lr": [LR, 3e-3]}
    assert [row["name"] for row in written["rows"]] == list(rows)
    best = found.folder / found.best
    assert yaml.safe_load((best / "recipe.yaml").read_text())["out"] == str(best)
    assert cases.run("generate", best, "say b", "--max-new-tokens", "2").endswith("\n")
    assert "loss:" in cases.run("eval", best)


def test_each_adapter_has_its_own_head(models, tmp_path, joint_sizes, one_thread):
    recipe = values(models, tmp_path, "bert", "text_classification", LABELLED)
    recipe["training"]["weight_decay"] = 0.1
    found = sweep(recipe, ["training.head_lr=1e-2,1e-3", "training.max_grad_norm=1.0,0.2"])
    assert set(joint_sizes) == {4}
    heads = [
        load_file(row.folder / "adapter" / "adapter_model.safetensors")[
            "base_model.model.classifier.weight"
        ]
        for row in found.rows
    ]
    assert all(not torch.equal(heads[0], other) for other in heads[1:])
    row = next(r for r in found.rows if r.name == "head_lr=1e-3,max_grad_norm=0.2")
    assert_equals_a_run_alone(row, recipe, tmp_path)


def test_different_kinds_of_adapters_on_a_quantised_base(models, tmp_path, joint_sizes, one_thread):
    recipe = values(models, tmp_path, base="nf4")
    over = [
        "strategy.use_dora=true,false",
        "strategy.target_modules=[q_proj,gate_proj],[down_proj]",
    ]
    found = sweep(recipe, over)
    assert set(joint_sizes) == {4}
    row = next(r for r in found.rows if r.name == "use_dora=True,target_modules=q_proj+gate_proj")
    assert_equals_a_run_alone(row, recipe, tmp_path)


def test_an_encoder_and_a_decoder_with_checkpointing_and_accumulation(
    models, tmp_path, joint_sizes, one_thread
):
    training = {"gradient_checkpointing": True, "gradient_accumulation": 2, "batch_size": 2}
    recipe = values(models, tmp_path, "t5", "seq2seq", PAIRS, training=training)
    found = sweep(recipe, ["strategy.r=2,4"])
    assert set(joint_sizes) == {2}
    assert_equals_a_run_alone(found.rows[0], recipe, tmp_path)


def test_a_loss_that_compares_rows_does_not_compare_those_of_other_adapters(
    models, tmp_path, joint_sizes, one_thread
):
    recipe = values(models, tmp_path, "bert", "embeddings", cases.pairs(24))
    found = sweep(recipe, ["strategy.r=2,4"])
    assert set(joint_sizes) == {2}
    assert_equals_a_run_alone(found.rows[1], recipe, tmp_path)


def test_losers_are_dropped_and_can_be_trained_to_their_ends(
    models, tmp_path, joint_sizes, one_thread
):
    recipe = values(models, tmp_path)
    found = sweep(recipe, ["training.lr=1e-2,3e-3,1e-9"], keep_best=1, after=0.4)
    # Two steps of all, after the comparison of joint steps in evaluation mode, and three of the best.
    assert joint_sizes == [3, 3, 1, 1, 1]
    assert [(row.status, row.steps) for row in found.rows] == [
        ("finished", 5),
        *[("dropped", 2)] * 2,
    ]
    assert_equals_a_run_alone_without_halving(found.rows[0], recipe, tmp_path)
    dropped = found.rows[1]
    assert dropped.quality == dropped.metrics["eval_loss"] > 0
    assert "is not finished (dropped)" in cases.run("eval", dropped.folder, code=1)
    later = train(dropped.folder / "recipe.yaml", "resume=true")
    assert (later.status, later.steps) == ("finished", 5)


def assert_equals_a_run_alone_without_halving(row, recipe, tmp_path):
    alone = train(
        recipe | {"out": str(tmp_path / "alone")}, f"training.lr={row.values['training.lr']}"
    )
    assert row.metrics == pytest.approx(alone.metrics, rel=1e-4)


def test_a_run_that_diverges_does_not_end_the_others(models, tmp_path, one_thread):
    recipe = values(models, tmp_path)
    found = sweep(recipe, {"training.lr": [LR, 1e30]})
    good, bad = found.rows
    assert (good.status, bad.status) == ("finished", "failed")
    assert found.best == good.name
    assert "the loss is" in bad.problems[0]
    assert f"**{bad.name}**: the loss is" in (found.folder / "report.md").read_text()
    assert_equals_a_run_alone(good, recipe, tmp_path)


def test_a_stopped_sweep_continues(models, tmp_path, one_thread):
    recipe = values(models, tmp_path)
    over = ["strategy.r=2,4"]
    whole = sweep(recipe, over)
    recipe["out"] = str(tmp_path / "second")
    file = cases.write_recipe(tmp_path / "r.yaml", recipe)
    command = ("sweep", file, "--over", *over, "--quiet")
    cases.run(*command, "training.stop_after=3", code=3)
    assert "already has a sweep" in cases.run(*command, code=1)
    other = ("sweep", file, "resume=true", "--over", "strategy.r=2,8")
    assert "has other runs: r=4 r=8" in " ".join(cases.run(*other, code=1).split())
    output = cases.run(*command, "resume=true")
    assert f"best: {whole.best}" in output
    for row in whole.rows:
        ours = load_file(tmp_path / "second" / row.name / "adapter" / "adapter_model.safetensors")
        theirs = load_file(row.folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_sweep_that_died_before_its_first_run_continues(models, tmp_path, one_thread):
    recipe = values(models, tmp_path)
    rows = [{"name": f"r={r}", "values": {"strategy.r": r}} for r in (2, 4)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps({"status": "running", "rows": rows}))
    found = sweep(recipe | {"resume": True}, ["strategy.r=2,4"])
    assert [row.status for row in found.rows] == ["finished", "finished"]


@pytest.mark.parametrize("stored", ["auto", "bf16"])
def test_a_model_that_mixes_rows_is_refused_before_anything_is_written(
    stored, models, tmp_path, monkeypatch, joint_sizes, one_thread
):
    load = base.load_base_model

    def mixing(*arguments):
        model = load(*arguments)
        model.model.layers[0].register_forward_hook(lambda m, a, out: out + out.mean(0, True))
        return model

    monkeypatch.setattr(base, "load_base_model", mixing)
    with pytest.raises(ContractError, match="its rows are not independent of each other"):
        sweep(values(models, tmp_path, base=stored), ["strategy.r=2,4"])
    assert not (tmp_path / "out").exists()


def test_rounding_that_a_model_enlarges_is_not_taken_for_mixed_rows(
    models, tmp_path, monkeypatch, joint_sizes, one_thread
):
    load = base.load_base_model

    def enlarge(module, inputs, out):
        # Each row by itself, but the last digits decide about the second one, as behind thirty layers in 16 bits.
        return out + 0.02 * torch.sin(1e7 * out.double()).to(out).detach()

    def enlarging(*arguments):
        model = load(*arguments)
        model.model.layers[0].register_forward_hook(enlarge)
        return model

    monkeypatch.setattr(base, "load_base_model", enlarging)
    found = sweep(values(models, tmp_path, data={}), ["strategy.r=2,4,8"])
    assert set(joint_sizes) == {3}
    assert [row.status for row in found.rows] == ["finished"] * 3


@pytest.mark.parametrize("keep_best", [None, 1])
def test_on_a_cpu_the_runs_take_turns_and_end_as_alone_to_the_bit(
    keep_best, models, tmp_path, monkeypatch, one_thread
):
    def refused(*arguments):
        raise AssertionError("a joint pass on a CPU")

    monkeypatch.setattr(passes.JointPasses, "_all", refused)
    recipe = values(models, tmp_path, strategy={"name": "lora", "r": 4, "lora_dropout": 0.3})
    found = sweep(recipe, {"training.lr": [LR, 3e-3]}, keep_best=keep_best, after=0.4)
    best = found.rows[0]
    assert [row.steps for row in found.rows] == [5, 5 if keep_best is None else 2]
    alone = train(
        recipe | {"out": str(tmp_path / "alone")}, f"training.lr={best.values['training.lr']}"
    )
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (best.folder, alone.folder)
    )
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert best.metrics == {k: v for k, v in alone.metrics.items() if k in best.metrics}


def test_dropout_is_drawn_for_each_adapter(models, tmp_path, joint_sizes, one_thread):
    found = sweep(values(models, tmp_path), {"strategy.lora_dropout": [0.3, 0.0]})
    assert set(joint_sizes) == {2}
    assert [row.problems for row in found.rows] == [[], []]
    assert found.rows[0].quality != found.rows[1].quality


@pytest.mark.parametrize(
    ("over", "changes", "message"),
    [
        (["strategy.r"], {}, "has no values; write KEY=VALUE,VALUE"),
        (["strategy.r=4"], {}, "must have two or more different values"),
        (["strategy.r=4,4"], {}, "must have two or more different values"),
        (["training.batch_size=2,4"], {}, "training.batch_size cannot vary in a sweep"),
        (["strategy.name=lora,prefix"], {}, "strategy.name cannot vary"),
        (["strategy.r=4,8", "strategy.r=2,3"], {}, "strategy.r is given twice"),
        ([], {}, "over is empty"),
        (["strategy.rank=4,8"], {}, "rank=4: strategy.rank=4: there is no such key"),
        (["strategy.init_lora_weights=true,pissa"], {}, "changes the weights of the base model"),
        (["strategy.bias=none,all"], {}, "which the adapters share"),
        (["strategy.r=4,8"], {"training": {"fsdp": True}}, "divides the model among processes"),
        (["training.lr=1e-3,1e-4"], {"strategy": {"name": "full"}}, "use lora"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused(over, changes, message, models, tmp_path):
    with pytest.raises(ContractError, match=message):
        sweep(values(models, tmp_path, **changes), over)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"keep_best": 2}, {}, "keep_best=2 of 2 runs; use a number from 1 to 1"),
        ({"keep_best": 1, "after": 1.0}, {}, "after=1.0 is no share"),
        ({"keep_best": 1}, {"data": {}}, "keep_best=1 needs an evaluation"),
    ],
)
def test_halving_needs_an_evaluation_and_losers(options, changes, message, models, tmp_path):
    with pytest.raises(ContractError, match=message):
        sweep(values(models, tmp_path, **changes), ["strategy.r=4,8"], **options)


def test_a_task_with_its_own_trainer_is_refused(models, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8
    with pytest.raises(ContractError, match="task='preference' has a trainer of its own"):
        sweep(values(models, tmp_path, task="preference", rows=rows), ["strategy.r=4,8"])


def test_metrics_are_not_sent_elsewhere(models, tmp_path):
    recipe = variants(values(models, tmp_path), read_over(["strategy.r=4,8"]))[0].recipe
    recipe.training.report_to.append("wandb")
    with pytest.raises(ContractError, match=r"r=4: training\.report_to=\['wandb'\] would mix"):
        require_together({"r=4": recipe})


def test_names_of_runs_are_names_of_folders(models, tmp_path):
    over = read_over({"strategy.target_modules": [["q_proj", "k_proj"], "all-linear", "a/b*"]})
    found = variants(values(models, tmp_path), over)
    names = ["target_modules=q_proj+k_proj", "target_modules=all-linear", "target_modules=a_b_"]
    assert [variant.name for variant in found] == names
    assert found[0].recipe.out == str(tmp_path / "out" / names[0])
    with pytest.raises(ContractError, match="two runs would have the name 'target_modules=a_b'"):
        variants(values(models, tmp_path), {"strategy.target_modules": ["a/b", "a*b"]})
