"""Recipes, data, models and folders that cannot be used: status 1, one line with a way out, nothing written. ``test_faults.py`` has more."""

import os
import shutil

import finetune_cases as cases
import pytest

SENTENCES = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(8)]


def put(name, content):
    """Write a file next to the recipe."""

    def change(folder, values):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        else:
            cases.write_jsonl(file, content)

    return change


def give(**changes):
    """Replace values of the recipe; a text ``@name`` is the path of a file next to it."""

    def change(folder, values):
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(values.get(name), dict):
                values[name] = values[name] | {k: _path(folder, v) for k, v in value.items()}
            else:
                values[name] = _path(folder, value)

    return change


def _path(folder, value):
    return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value


def in_model(name, act):
    """Change a file of a copy of the model."""

    def change(folder, values):
        shutil.copytree(values["model"], folder / "m")
        values["model"] = str(folder / "m")
        act(folder / "m" / name)

    return change


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def classify(rows):
    """Text classification with other rows."""

    def change(folder, values):
        values["task"] = "text_classification"
        put("d.jsonl", rows)(folder, values)

    return change


def training(**changes):
    return give(training=changes)


def lora(**changes):
    return give(strategy={"name": "lora", "r": 4, **changes})


TASK = give(task="text_classification")
DATA = {
    "Latin-1": (
        [put("d.jsonl", '{"prompt": "é", "completion": "é"}\n'.encode("latin-1"))],
        "d.jsonl is not UTF-8 text",
    ),
    "UTF-16": (
        [put("d.csv", "text,label\na,b\n".encode("utf-16")), TASK, give(data={"train": "@d.csv"})],
        "d.csv is not UTF-8 text",
    ),
    "zeros": ([put("d.jsonl", bytes(100))], "d.jsonl:1: no valid JSON"),
    "a list of numbers": (
        [put("d.json", "[1, 2]"), give(data={"train": "@d.json"})],
        "d.json row 1: a int instead of an object",
    ),
    "JSON lines as JSON": (
        [put("d.json", '{"a": 1}\n{"a": 2}\n'), give(data={"train": "@d.json"})],
        "use the ending .jsonl",
    ),
    "header only": (
        [put("d.csv", "text,label\n"), TASK, give(data={"train": "@d.csv"})],
        "data.train has no row that can be used (0 read)",
    ),
    "more values than columns": (
        [put("d.csv", "text,label\na,b,c\n"), TASK, give(data={"train": "@d.csv"})],
        "d.csv:2: more values than the 2 columns",
    ),
    "no Parquet": (
        [put("d.parquet", "text"), give(data={"train": "@d.parquet"})],
        "cannot be read as Parquet",
    ),
    "unknown ending": (
        [put("d.xlsx", "x"), give(data={"train": "@d.xlsx"})],
        "the format of .xlsx is not known; set data.format",
    ),
    "empty folder": (
        [put("e/readme.rst", "x"), give(data={"train": "@e"})],
        "has no file of a known format",
    ),
    "no such file": ([give(data={"train": "@x.jsonl"})], "x.jsonl' does not exist"),
    "no such data set": ([give(data={"train": "hub:no/data"})], "cannot be loaded from the Hub"),
    "folder format for a file": (
        [give(data={"format": "images"})],
        "data.format='images' needs a folder",
    ),
    "column that is not there": (
        [classify(SENTENCES), give(data={"columns": {"text": "body"}})],
        "d.jsonl:1: no column 'body', which data.columns.text names",
    ),
    "no column": (
        [classify([{"body": "x", "label": "a"}, *SENTENCES])],
        "d.jsonl:1: no column 'text' (the row has 'body', 'label')",
    ),
    "one class": (
        [classify([{"text": "x", "label": "a"}] * 4)],
        "the training rows have 1 different labels (a), but at least 2 are needed",
    ),
    "label that is a list": (
        [classify([{"text": "x", "label": ["a"]}] * 4)],
        "d.jsonl:1: label ['a'] is of type list",
    ),
    "empty label": ([classify([{"text": "x", "label": None}, *SENTENCES])], "column 'label'"),
    "label of eval alone": (
        [
            classify(SENTENCES),
            put("e.jsonl", [{"text": "x", "label": "c"}]),
            give(data={"eval": "@e.jsonl"}),
        ],
        "'c'",
    ),
    "tags of another length": (
        [
            give(task="token_classification"),
            put("d.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}, *cases.tagged(4)]),
        ],
        "d.jsonl:1",
    ),
    "all rows too long": (
        [training(seq_len=4), give(data={"truncation": "error"})],
        "training.seq_len=4",
    ),
    "all rows dropped": (
        [training(seq_len=4), give(data={"truncation": "drop"})],
        "data.train has no row that can be used",
    ),
    "share of no row": ([give(data={"eval": 0.01})], "data.eval=0.01 of 8 rows is 0 rows"),
    "eval without rows": (
        [put("e.jsonl", ""), give(data={"eval": "@e.jsonl"})],
        "data.eval has no row that can be used",
    ),
    "no role": ([put("d.jsonl", [{"messages": [{"role": "boss", "content": "x"}]}])], "d.jsonl:1"),
    "messages of text": ([put("d.jsonl", [{"messages": "hello"}])], "d.jsonl:1: column 'messages'"),
    "no image": (
        [
            give(task="image_classification"),
            put("i/a/x.png", "x"),
            put("i/b/x.png", "x"),
            give(data={"train": "@i"}),
        ],
        "image",
    ),
}

MODELS = {
    "no config": ([in_model("config.json", lambda file: file.unlink())], "has no config.json"),
    "config that is cut off": (
        [in_model("config.json", halve)],
        "config.json' is not a valid JSON file",
    ),
    "unknown architecture": (
        [in_model("config.json", lambda file: file.write_text('{"model_type": "llamma"}'))],
        "llamma",
    ),
    "weights that are cut off": (
        [in_model("model.safetensors", halve)],
        "model.safetensors is truncated: tensor",
    ),
    "empty weights": (
        [in_model("model.safetensors", lambda file: file.write_bytes(b""))],
        "model.safetensors is truncated or not a safetensors file: it has 0 bytes",
    ),
    "no weights": (
        [in_model("model.safetensors", lambda file: file.unlink())],
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "no tokenizer": (
        [
            in_model(
                "tokenizer.json",
                lambda file: (file.unlink(), (file.parent / "tokenizer_config.json").unlink()),
            )
        ],
        "has no tokenizer",
    ),
    "tokenizer that is cut off": ([in_model("tokenizer.json", halve)], "has no tokenizer"),
    "a file": (
        [put("m.bin", "x"), give(model="@m.bin")],
        "is a file; name the folder with config.json",
    ),
    "another kind of model": (
        [give(task="masked_lm"), put("d.jsonl", [{"text": "abc"}] * 4)],
        "AutoModelForMaskedLM has no class for LlamaConfig",
    ),
    "no adapter": ([give(adapter="@nowhere")], "nowhere' has no adapter_model.safetensors"),
    "an adapter for full tuning": (
        [give(adapter="@a", strategy="full")],
        "which trains no adapter",
    ),
    "random weights for LoRA": ([give(weights="random")], "use strategy=full"),
}

PLACES = {
    "a file": ([put("out", "x")], "out' is a file; name a new folder"),
    "below a file": ([put("f", "x"), give(out="@f/out")], "is no folder; name another folder"),
    "a run": ([put("out/recipe.yaml", "x")], "already has a run; continue it with resume=true"),
    "the model": (
        [in_model("config.json", lambda file: None), give(out="@m")],
        "is the same folder as model",
    ),
    "the data": (
        [put("e/d.jsonl", cases.chats(8)), give(data={"train": "@e"}, out="@e")],
        "is the same folder as data.train",
    ),
    "inside the data": (
        [put("e/d.jsonl", cases.chats(8)), give(data={"train": "@e"}, out="@e/out")],
        "is inside data.train",
    ),
    "inside the rows of eval": (
        [put("e/d.jsonl", cases.chats(8)), give(data={"eval": "@e"}, out="@e/out")],
        "is inside data.eval",
    ),
    "resume without a run": (
        [give(resume=True)],
        "has no run (no recipe.yaml); remove resume=true",
    ),
    "resume is a word": ([give(resume="yes")], "resume='yes' must be true or false"),
}

NUMBERS = {
    "lr of 0": ([training(lr=0)], "training.lr=0 is out of range; it must be above 0"),
    "lr that is no number": ([training(lr="nan")], "training.lr='nan'"),
    "infinite lr": ([training(lr="inf")], "training.lr='inf'"),
    "epochs of 0": ([training(max_steps=None, epochs=0)], "training.epochs=0 is out of range"),
    "no forward": (
        [training(gradient_accumulation=0)],
        "training.gradient_accumulation=0 is out of range",
    ),
    "no norm": ([training(max_grad_norm=0)], "training.max_grad_norm=0 is out of range"),
    "negative decay": ([training(weight_decay=-1)], "training.weight_decay=-1 is out of range"),
    "negative warm-up": ([training(warmup=-1)], "training.warmup=-1 is out of range"),
    "negative seed": ([training(seed=-1)], "training.seed=-1 is out of range"),
    "smoothing of 1": ([training(label_smoothing=1)], "training.label_smoothing=1 is out of range"),
    "no checkpoint": (
        [training(keep_checkpoints=0)],
        "training.keep_checkpoints=0 is out of range",
    ),
    "checkpoint at unknown times": ([training(checkpoint_every="epochs")], "did you mean 'epoch'"),
    "precision of 16 bits": ([training(precision="fp16")], "training.precision='fp16' is unknown"),
    "length of 1": ([training(seq_len=1)], "training.seq_len=1 is out of range"),
    "no row": ([give(data={"max_rows": 0})], "data.max_rows=0 is out of range"),
    "rank larger than the matrices": (
        [lora(r=5000)],
        "r=5000 is larger than both sides of every weight",
    ),
    "negative dropout": ([lora(lora_dropout=-1.0)], "lora_dropout=-1.0"),
    "no target": ([lora(target_modules=[])], "target_modules"),
    "block that is not there": ([lora(layers_to_transform=[7])], "layers_to_transform"),
    "decay of layers and LoRA+": (
        [training(layer_decay=0.5, lora_plus_ratio=4)],
        "cannot be combined; keep one",
    ),
    "early stopping by the last": (
        [give(data={"eval": 0.5}), training(best_metric="last", early_stopping=1)],
        "needs a metric",
    ),
    "smoothing without an effect": (
        [give(task="embeddings"), training(label_smoothing=0.1)],
        "has no effect on the loss of task embeddings",
    ),
    "fp16 for full tuning": (
        [give(base="fp16", strategy="full")],
        "updates of fp16 weights round to zero",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def assert_refused(faults, fault, model, tmp_path):
    changes, expected = faults[fault]
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    values = cases.recipe(model, "sft", data, tmp_path / "out")
    for change in changes:
        change(tmp_path, values)
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    before = {f: f.stat().st_size for f in tmp_path.rglob("*")}
    printed = cases.run("train", file, "--quiet", code=1)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert expected in lines[0]
    assert "Traceback" not in printed
    assert {f: f.stat().st_size for f in tmp_path.rglob("*")} == before


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize("fault", DATA)
def test_faulty_data(fault, model, tmp_path, one_thread):
    assert_refused(DATA, fault, model, tmp_path)


@pytest.mark.parametrize("fault", MODELS)
def test_a_faulty_model(fault, model, tmp_path, one_thread):
    assert_refused(MODELS, fault, model, tmp_path)


@pytest.mark.parametrize("fault", PLACES)
def test_a_faulty_folder_for_the_run(fault, model, tmp_path, one_thread):
    assert_refused(PLACES, fault, model, tmp_path)


@pytest.mark.parametrize("fault", NUMBERS)
def test_faulty_settings(fault, model, tmp_path, one_thread):
    assert_refused(NUMBERS, fault, model, tmp_path)


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    access = os.access

    def refuses(path, mode):
        return access(path, mode) and mode != os.W_OK | os.X_OK

    monkeypatch.setattr(os, "access", refuses)
    assert_refused({"": ([], f"because {tmp_path} cannot be written")}, "", model, tmp_path)


def test_an_evaluation_on_training_rows_is_said(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    rows = [*cases.chats(2), *cases.chats(12)[10:]]
    other = cases.write_jsonl(tmp_path / "e.jsonl", rows)
    values = cases.recipe(model, "sft", data, tmp_path / "out", data={"eval": str(other)})
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    note = "2 samples of the evaluation are training samples too"
    assert note in printed
    assert note in (tmp_path / "out" / "report.md").read_text()
