"""Faulty recipes and data: a clear error in one line with status 1, and nothing written."""

import json

import finetune_cases as cases
import pytest

RECIPES = {
    "unknown key": (
        {"traning": {}},
        [],
        "traning={}: there is no such key; did you mean 'training'",
    ),
    "unknown training key": (
        {"training": {"lrr": 1}},
        [],
        "training.lrr=1: there is no such key; did you mean 'training.lr'",
    ),
    "unknown data key": ({}, ["data.collumns={}"], "did you mean 'data.columns'"),
    "unknown strategy key": (
        {"strategy": {"name": "lora", "rank": 8}},
        [],
        "strategy.rank=8: there is no such key",
    ),
    "unknown task": ({"task": "stf"}, [], "task='stf' is unknown; did you mean 'sft'"),
    "unknown strategy": (
        {"strategy": "lorra"},
        [],
        "strategy='lorra' is unknown; did you mean 'lora'",
    ),
    "unknown task option": (
        {},
        ["task.pack=true"],
        "task.pack=True: there is no such key; did you mean 'task.packing'",
    ),
    "unknown base": ({"base": "nf5"}, [], "base='nf5' is unknown; did you mean 'nf4'"),
    "unknown word": (
        {},
        ["training.scheduler=cosin"],
        "training.scheduler='cosin' is unknown; did you mean 'cosine'",
    ),
    "unknown optimizer": (
        {},
        ["training.optimizer=adamv"],
        "training.optimizer='adamv' is unknown",
    ),
    "unknown metric": (
        {},
        ["data.eval=0.5", "training.best_metric=acuracy"],
        "is no metric of sft",
    ),
    "unknown column": (
        {},
        ["data.columns.mesages=x"],
        "sft has no column 'mesages'; did you mean 'messages'",
    ),
    "text for a number": (
        {},
        ["training.lr=fast"],
        "training.lr='fast' is text; it must be a number",
    ),
    "number for a text": ({"out": 3}, [], "out=3 is of type int; it must be text"),
    "bool for a number": (
        {},
        ["training.batch_size=true"],
        "training.batch_size=True is true or false; it must be a whole number",
    ),
    "fraction of a batch": (
        {},
        ["training.batch_size=1.5"],
        "training.batch_size=1.5 is a number; it must be a whole number",
    ),
    "negative rate": (
        {},
        ["training.lr=-1e-4"],
        "training.lr=-0.0001 is out of range; it must be above 0",
    ),
    "zero batch": (
        {},
        ["training.batch_size=0"],
        "training.batch_size=0 is out of range; it must be at least 1",
    ),
    "rank of zero": ({}, ["strategy.r=0"], "r=0 is below 1"),
    "rank as text": (
        {"strategy": {"name": "lora", "r": "8"}},
        [],
        "strategy.r='8' is text; it must be a whole number",
    ),
    "dropout of one": ({}, ["strategy.lora_dropout=1.0"], "lora_dropout=1.0 drops every input"),
    "list for a mapping": ({"training": [1]}, [], "training=[1] is a list; it must have keys"),
    "epochs and steps": (
        {},
        ["training.epochs=2"],
        "training.epochs=2 and training.max_steps=4 are both given",
    ),
    "warmup too long": (
        {},
        ["training.warmup=10"],
        "training.warmup=10 steps are not fewer than training.max_steps=4",
    ),
    "early stopping without eval": (
        {},
        ["training.early_stopping=2"],
        "training.early_stopping=2 needs an evaluation",
    ),
    "eval is train": (
        {"data": {"train": "x.jsonl", "eval": "x.jsonl"}},
        [],
        "is the same as data.train",
    ),
    "share of two": ({}, ["data.eval=2"], "data.eval=2 is no share"),
    "quantised full tuning": (
        {"base": "nf4", "strategy": "full"},
        [],
        "base='nf4' is quantised and cannot be trained itself",
    ),
    "LoRA+ without LoRA": (
        {"strategy": "prefix"},
        ["training.lora_plus_ratio=16"],
        "is for strategy lora, not prefix",
    ),
    "mix of one": (
        {"strategy": {"name": "mix", "lora": {}}},
        [],
        "give two or three of lora, bottleneck, prefix",
    ),
    "bad pattern": (
        {"strategy": {"name": "partial", "pattern": "("}},
        [],
        "is not a regular expression",
    ),
    "no task": ({"task": None}, [], "the recipe has no task"),
    "no data": ({"data": {}}, [], "the recipe has no data.train"),
    "no model": ({"model": None}, [], "the recipe has no model"),
    "out is here": ({"out": "."}, [], "is the current or the root folder"),
    "no override": ({}, ["training.lr"], "'training.lr' is no override; write key=value"),
    "override of a value": ({}, ["model.name=x"], "model has no keys of its own"),
    "resume without a run": ({}, ["resume=true"], "has no run"),
    "target that matches nothing": ({}, ["strategy.target_modules=[q_prj]"], "'q_prj'"),
    "model is not there": (
        {"model": "/nowhere/model"},
        [],
        "model='/nowhere/model' does not exist",
    ),
    "gguf is not there": (
        {"model": "/nowhere/m.gguf"},
        [],
        "does not exist; correct the path of the GGUF file",
    ),
    "too many blocks": ({"strategy": {"name": "partial", "last_blocks": 9}}, [], "has 2 blocks"),
    "nothing selected": ({"strategy": "partial"}, [], "selects no weight"),
    "probe without a head": ({"strategy": "probe_then_tune"}, [], "needs a task head"),
    "too few steps to unfreeze": (
        {"strategy": {"name": "gradual", "stage_steps": 2}},
        [],
        "some weights would never be trained",
    ),
    "too long": ({}, ["training.seq_len=500"], "training.seq_len=500, but"),
    "stop after the end": (
        {},
        ["training.stop_after=4"],
        "training.stop_after=4 is not below training.max_steps=4",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


@pytest.mark.parametrize("fault", RECIPES)
def test_a_faulty_recipe_is_one_line_and_writes_nothing(fault, model, tmp_path, one_thread):
    changes, overrides, expected = RECIPES[fault]
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    values = cases.recipe(model, "sft", data, tmp_path / "runs" / "out")
    values |= {name: value for name, value in changes.items() if value is not None}
    for name in [name for name, value in changes.items() if value is None]:
        del values[name]
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    before = sorted(tmp_path.rglob("*"))
    printed = cases.run("train", file, *overrides, "--quiet", code=1)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in printed
    assert sorted(tmp_path.rglob("*")) == before


GOOD = json.dumps(cases.chats(1)[0])
DATA = {
    "no JSON": (f"{GOOD}\n{{\n", "d.jsonl:2: no valid JSON"),
    "no object": (f"{GOOD}\n[1]\n", "d.jsonl:2: a JSON list instead of an object"),
    "no column": (
        f'{GOOD}\n\n{{"text": "x"}}\n',
        "d.jsonl:3: neither column 'messages' nor 'prompt'",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "x"}]}\n',
        "d.jsonl:1: no message has the role 'assistant'",
    ),
    "empty answer": (
        '{"prompt": "x", "completion": ""}\n',
        "d.jsonl:1: column 'completion' is empty",
    ),
    "wrong type": (
        '{"prompt": "x", "completion": 3}\n',
        "d.jsonl:1: column 'completion' is 3 of type int, not text",
    ),
    "no role": ('{"messages": [{"content": "x"}]}\n', "d.jsonl:1: message 1 has no role"),
    "empty file": ("", "data.train has no row that can be used"),
    "masked by truncation": (
        json.dumps({"prompt": "x" * 70, "completion": "y"}) + "\n",
        "d.jsonl:1: no label is left that the loss could use: it has",
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_a_bad_row_is_named_with_file_and_line(fault, model, tmp_path, one_thread):
    text, expected = DATA[fault]
    data = tmp_path / "d.jsonl"
    data.write_text(text)
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, "sft", data, tmp_path / "runs" / "out")
    )
    before = sorted(tmp_path.rglob("*"))
    assert expected in cases.run("train", file, "--quiet", code=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_no_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    for text, expected in (
        ("", "it is empty"),
        ("- 1\n", "it is of type list"),
        ("a: [\n", "is not valid YAML"),
        ("out: a\nout: b\n", "the key 'out' is there 2 times; keep one of them, line"),
        ("task: !!python/object:os.system x\n", "is not valid YAML"),
    ):
        file.write_text(text)
        assert expected in cases.run("train", file, code=1)
    assert "is no file" in cases.run("train", tmp_path / "nowhere.yaml", code=1)
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in cases.run("train", file, code=1)


def test_a_run_is_not_overwritten(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, "sft", data, tmp_path / "full")
    )
    assert "is not empty and is no run" in cases.run("train", file, code=1)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert "is no run of peftkit train" in cases.run("generate", tmp_path / "full", "x", code=1)
    assert "is no run of peftkit train" in cases.run("eval", tmp_path / "full", code=1)
