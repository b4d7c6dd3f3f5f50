"""Every example recipe runs as it is written, except for the model, the data, the length and the folder."""

import json
from pathlib import Path

import finetune_cases as cases
import pytest

from peftkit.finetune import read_recipe
from peftkit.finetune.tasks import TASKS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SHORT = (
    "training.max_steps=6",
    "training.epochs=null",
    "training.batch_size=4",
    "training.seq_len=64",
)


LETTERS = "abcdefghijklmnopqrstuvwx"


def texts(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(24)))
    return folder


DATA = {
    "sft": ("llama", lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.chats(80))),
    "preference": (
        "llama",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [{"prompt": c, "chosen": c * 2, "rejected": c * 3} for c in LETTERS],
        ),
    ),
    "causal_lm": ("llama", lambda folder: texts(folder / "texts")),
    "masked_lm": ("masked bert", lambda folder: texts(folder / "texts")),
    "text_classification": (
        "bert",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", [{"review": "ab" * (i % 3 + 1), "stars": i % 3} for i in range(24)]
        ),
    ),
    "token_classification": (
        "bert",
        lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.tagged(24)),
    ),
    "seq2seq": (
        "t5",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [{"article": c * 4, "summary": c} for c in LETTERS],
        ),
    ),
    "image_classification": ("vit", lambda folder: cases.images(folder / "images", 8)),
    "embeddings": ("bert", lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.pairs(24))),
}


def test_there_is_a_recipe_for_each_task():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(DATA) == set(TASKS)


@pytest.mark.parametrize("task", DATA)
def test_an_example_recipe_runs(task, tmp_path, one_thread):
    name, write = DATA[task]
    model = cases.save_model(tmp_path / "m", name, chat=task in ("sft", "preference"))
    changes = [f"model={model}", f"data.train={write(tmp_path)}", f"out={tmp_path / 'run'}", *SHORT]
    if task in ("sft", "preference"):
        changes.append("data.eval=0.2")
    if task == "image_classification":
        changes += ["training.workers=0", "strategy.blocks_per_stage=1"]
    # The tiny models have two blocks and a width of 32.
    changes += ["strategy.reduction_factor=4"] if task == "token_classification" else []
    changes += ["strategy.last_blocks=1"] if task == "causal_lm" else []
    cases.run("train", RECIPES / f"{task}.yaml", *changes, "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    before, after = (
        read_recipe(RECIPES / f"{task}.yaml"),
        read_recipe(tmp_path / "run" / "recipe.yaml"),
    )
    assert (before.task, before.strategy.name) == (after.task, after.strategy.name)
