"""Recipes: reading, overrides, defaults, and what ``--init`` writes."""

import dataclasses

import finetune_cases as cases
import pytest
import yaml

from peftkit import ContractError
from peftkit.finetune import read_recipe
from peftkit.finetune.recipe import TrainingRecipe
from peftkit.finetune.tasks import TASKS, require_task


def values(**changes):
    return {"model": "m", "task": "sft", "data": {"train": "d.jsonl"}, "out": "runs/x"} | changes


def test_defaults_and_names():
    recipe = read_recipe(values())
    assert (recipe.task.name, recipe.strategy.name, recipe.base) == ("sft", "lora", "auto")
    assert (recipe.strategy.options.r, recipe.strategy.options.lora_alpha) == (16, 32)
    assert recipe.training == TrainingRecipe()


def test_overrides_replace_values_and_add_options_to_a_name():
    recipe = read_recipe(
        values(strategy="lora"),
        [
            "training.lr=1e-4",
            "strategy.r=8",
            "task.packing=true",
            "data.columns.prompt=q",
            "data.eval=0.1",
        ],
    )
    assert recipe.training.lr == 1e-4
    assert recipe.strategy.options.r == 8
    assert recipe.task.options.packing is True
    assert recipe.data.columns == {"prompt": "q"}
    assert recipe.data.eval == 0.1
    again = read_recipe(values(), ["strategy=full", "strategy={name: partial, last_blocks: 2}"])
    assert (again.strategy.name, again.strategy.options.last_blocks) == ("partial", 2)


def test_yaml_reads_numbers_with_an_exponent(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values()) + "training: {lr: 2e-5}\n")
    assert read_recipe(file).training.lr == 2e-5


def test_a_resolved_recipe_reads_as_the_same_recipe():
    mixed = {"name": "mix", "lora": {"r": 8}, "bottleneck": {"reduction_factor": 4}}
    for strategy in ("full", mixed, {"name": "lora", "target_modules": ["q_proj"]}, "ia3"):
        recipe = read_recipe(values(strategy=strategy))
        assert read_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()
    written = read_recipe(values(strategy=mixed)).to_dict()["strategy"]
    assert written == {
        "name": "mix",
        "lora": {"r": 8, "lora_alpha": 32},
        "bottleneck": {"reduction_factor": 4.0},
    }


def test_the_options_of_a_strategy_are_all_fields_of_its_config():
    recipe = read_recipe(
        values(strategy={"name": "lora", "use_dora": True, "rank_pattern": {"q_proj": 4}})
    )
    assert recipe.strategy.options.use_dora
    assert recipe.strategy.options.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_a_recipe_that_can_be_read(task, tmp_path):
    text = cases.run("train", "--init", task)
    recipe = read_recipe(yaml.safe_load(text))
    assert recipe.task.name == task
    # Every key is there, written or commented out.
    lines = [line.strip().removeprefix("# ") for line in text.splitlines()]
    for name in [f.name for f in dataclasses.fields(TrainingRecipe)]:
        assert any(line.startswith(f"{name}:") for line in lines), name
    uncommented = "\n".join(
        f"  {line.strip().removeprefix('# ')}"
        for line in text.partition("\ntraining:\n")[2].splitlines()
        if ":" in line
        and line.strip().removeprefix("# ").partition(":")[0]
        in {f.name for f in dataclasses.fields(TrainingRecipe)} - {"max_steps"}
    )
    written = yaml.safe_load("training:\n" + uncommented)["training"]
    assert written["lr"] is None
    assert written.keys() == {f.name for f in dataclasses.fields(TrainingRecipe)} - {"max_steps"}
    assert require_task(task).summary in text


def test_init_keeps_files_that_exist(tmp_path):
    file = tmp_path / "r.yaml"
    cases.run("train", "--init", "sft", file)
    before = file.read_text()
    assert "exists" in cases.run("train", "--init", "sft", file, code=1)
    assert file.read_text() == before
    assert "did you mean 'sft'" in cases.run("train", "--init", "sfft", code=1)


def test_numbers_as_text_are_accepted_only_for_numbers():
    assert read_recipe(values(training={"lr": "3e-4"})).training.lr == 3e-4
    with pytest.raises(
        ContractError, match=r"training\.seed='3' is text; it must be a whole number"
    ):
        read_recipe(values(training={"seed": "3"}))
