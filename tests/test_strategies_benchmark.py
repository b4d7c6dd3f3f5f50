"""The benchmark of strategies: its rows, its tables, resuming, and one comparison with a tiny model."""

import ast
import gzip
import importlib
import json

import finetune_cases as cases
import pytest
import torch
import transformers as hf
from benchmark_scripts import FOLDER, load_script


@pytest.fixture
def strategies(monkeypatch):
    """benchmarks/strategies.py, whose functions import their siblings."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script("strategies")


@pytest.fixture
def data():
    return load_script("strategy_data")


@pytest.fixture
def command(strategies):
    """Run the command with options, without a comparison."""

    def call(*options):
        parser = strategies.argparse.ArgumentParser()
        strategies.add_options(parser)
        strategies.run(parser.parse_args(list(map(str, options))))

    return call


def test_roles_of_names_are_those_in_the_syntax_tree(data):
    source = '''
def weigh(self, items, *, unit="kg"):
    """Text."""
    total = sum(item.mass for item in items)
    return self.scale(total, unit=unit)
'''
    row = data.roles_of(ast.parse(source).body[0])
    tagged = list(zip(row["tokens"], row["tags"], strict=True))
    assert len(row["tokens"]) == 40
    assert tagged[:3] == [("def", "O"), ("weigh", "O"), ("(", "O")]
    names = [(word, tag[2:]) for word, tag in tagged if tag != "O"]
    assert names == [
        *(("self", "parameter"), ("items", "parameter"), ("unit", "parameter")),
        *(("total", "local"), ("sum", "global"), ("item", "local"), ("mass", "attribute")),
        *(("item", "local"), ("items", "parameter"), ("self", "parameter")),
        *(("scale", "attribute"), ("total", "local"), ("unit", "keyword"), ("unit", "parameter")),
    ]
    assert row["tokens"].count("text") == 2
    assert data.roles_of(ast.parse("def f(): pass").body[0]) is None


@pytest.mark.parametrize("name", ["docstrings", "names_in_code", "descriptions", "reference"])
def test_rows_are_the_same_each_time_and_held_out_ones_are_others(name, data, monkeypatch):
    monkeypatch.setattr(data, "PACKAGES", ["networkx", "datasets"])
    found = getattr(data, name)(24, 8)
    assert (len(found.train), len(found.held_out)) == (24, 8)
    assert found == getattr(data, name)(24, 8)
    assert all(row not in found.train for row in found.held_out)
    if name == "docstrings":
        rows = [*found.train, *found.held_out]
        assert {row["label"] for row in rows} == {"networkx", "datasets"}
        assert not any(row["label"] in row["text"].lower() for row in rows)
    if name == "descriptions":
        assert all(row["positive"].endswith(")") for row in found.train)


def test_too_few_rows_and_absent_sources_are_named(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="give 2 rows, but 3 are needed"):
        data._drawn(([1, 2], [1]), (3, 1))
    monkeypatch.setattr(data, "BESIDE", tmp_path)
    with pytest.raises(SystemExit, match=r"digits\.csv\.gz is missing; run make bench"):
        data.digits(1, 1)
    with pytest.raises(SystemExit, match="nowhere is not installed"):
        data._folder("nowhere")


def test_digits_are_images_with_labels(data, tmp_path, monkeypatch):
    file = tmp_path / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    file.parent.mkdir(parents=True)
    lines = [",".join([*map(str, [float(i)] * 64), str(float(i % 10))]) for i in range(17)]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(data, "BESIDE", tmp_path)
    found = data.digits(3, 2)
    assert [row["label"] for row in (*found.train, *found.held_out)] == ["0", "1", "2", "5", "6"]
    assert found.held_out[1]["image"].size == (8, 8)
    assert found.held_out[1]["image"].getpixel((3, 3)) == (255, 255, 255)
    assert found.train[2]["image"].getpixel((3, 3)) == (32, 32, 32)


def row(name, quality, **changes):
    values = {"loss": 1.5, "rate": 1e-3, "seconds": 12.4, "peak_mib": 99.6, "trained": 1234}
    return {"name": name, "quality": quality, **values, **changes}


def test_tables_have_every_row_and_where_a_strategy_loses(strategies):
    tasks = {
        "docstrings": {
            "steps": 7,
            "rows": [row("probe", 0.75), row("lora", 0.5)],
            "warnings": ["lora loses to a linear probe"],
        },
        "reference": {
            "steps": 3,
            "rows": [row("pretrained", 3.25, rate=None, trained=0), row("lora", 2.5)],
            "warnings": [],
        },
    }
    environment = {"cpu": "a processor", "threads": 2}
    lines = strategies.table({"environment": environment, "tasks": tasks}).splitlines()
    assert lines[0] == "**quality** (a processor, 2 threads)"
    assert lines[2] == "| | docstrings (higher is better) | reference (lower is better) |"
    assert lines[4:7] == [
        "| probe | 0.750 |  |",
        "| lora | 0.500 | 2.500 |",
        "| pretrained |  | 3.250 |",
    ]
    assert "7 steps, batches of 16; quality: accuracy, eight classes" in lines[8]
    assert "| lora | 0.500 | 1.500 | 0.001 | 12 | 100 | 1,234 |" in lines
    assert "| pretrained | 3.250 | 1.500 |  | 12 | 100 | 0 |" in lines
    assert "- lora loses to a linear probe" in lines


def test_finished_tasks_are_kept_and_other_settings_refused(
    command, strategies, tmp_path, monkeypatch, capsys
):
    measured = []

    def stub(name, settings):
        measured.append(name)
        return {"steps": 1, "rows": [row("lora", 0.5)], "warnings": []}

    monkeypatch.setattr(strategies, "_in_process", stub)
    monkeypatch.setattr(strategies, "RESULT", tmp_path / "never.json")
    out = tmp_path / "r.json"
    command("--tasks", "roles", "--strategies", "lora", "--out", out)
    command("--tasks", "roles", "digits", "--strategies", "lora", "--out", out, "--resume")
    assert measured == ["roles", "digits"]
    assert list(json.loads(out.read_text())["tasks"]) == ["roles", "digits"]
    assert "| lora | 0.500 | 0.500 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"r\.json has another strategies; leave --resume out"):
        command("--tasks", "roles", "--strategies", "full", "--out", out, "--resume")
    command("--tasks", "roles", "--smoke")
    assert not strategies.RESULT.exists()
    assert strategies.stored_table() == strategies.NOT_MEASURED


def test_one_task_is_compared_and_rows_have_the_names_of_the_table(
    strategies, tmp_path, monkeypatch, one_thread
):
    models = importlib.import_module("strategy_models")

    def save(name, folder, smoke):
        assert (name, smoke) == ("minilm", True)
        return cases.save_model(folder, "bert")

    monkeypatch.setattr(models, "prepare", save)
    settings = {"strategies": ["probe_then_tune", "dora"], "steps": 2, "seed": 3, "smoke": True}
    found = strategies.prove("descriptions", settings, tmp_path)
    # There is no head to probe.
    assert [row["name"] for row in found["rows"]] == ["pretrained", "scratch", "dora"]
    pretrained, scratch, dora = found["rows"]
    assert (pretrained["rate"], scratch["rate"], dora["rate"]) == (None, 5e-4, 1e-3)
    assert pretrained["trained"] == 0 < dora["trained"] < scratch["trained"]
    assert all(0 < row["quality"] <= 1 for row in found["rows"])
    written = (tmp_path / "runs" / "lora" / "recipe.yaml").read_text()
    assert "use_dora: true" in written
    assert "seed: 3" in written
    assert strategies._warning("lora loses. More.", {"lora": "dora"}) == "dora loses"


def test_exact_matches_compare_whole_records(tmp_path, monkeypatch):
    models = load_script("strategy_models")
    base = cases.save_model(tmp_path / "m", "llama", chat=True)
    rows = [{"prompt": "a", "completion": "7"}, {"prompt": "bcd", "completion": "9"}]
    tokenizer = hf.AutoTokenizer.from_pretrained(base)

    def generate(self, input_ids, attention_mask, **options):
        assert attention_mask[0, 0] == 0  # padded on the left
        written = tokenizer(["7", "8"], return_tensors="pt", padding=True).input_ids
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr(hf.LlamaForCausalLM, "generate", generate)
    assert models.exact_matches(base, base, rows) == 0.5
    assert models._object("no json") is None
