"""Rows from every kind of source, with counts of what was bad, truncated or masked."""

import json

import datasets
import finetune_cases as cases
import pandas
import pytest

from peftkit import ContractError
from peftkit.finetune.rows import read_rows

ROWS = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefgh"]


def sources(folder):
    table = pandas.DataFrame(ROWS)
    cases.write_jsonl(folder / "d.jsonl", ROWS)
    (folder / "d.json").write_text(json.dumps(ROWS))
    (folder / "d2.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    table.to_csv(folder / "d.csv", index=False)
    table.to_csv(folder / "d.tsv", index=False, sep="\t")
    table.to_parquet(folder / "d.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    (folder / "parts").mkdir()
    cases.write_jsonl(folder / "parts" / "1.jsonl", ROWS[:3])
    cases.write_jsonl(folder / "parts" / "2.jsonl", ROWS[3:])
    names = ("d.jsonl", "d.json", "d2.json", "d.csv", "d.tsv", "d.parquet", "saved", "parts")
    found = {name: str(folder / name) for name in names}
    found["list of files"] = [str(folder / "parts" / "1.jsonl"), str(folder / "parts" / "2.jsonl")]
    return found | {"dataset": datasets.Dataset.from_list(ROWS), "list": ROWS}


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    for name, source in sources(tmp_path).items():
        assert [row.values for row in read_rows(source, "auto", "data.train")] == ROWS, name


def test_a_data_set_on_the_hub_has_a_name_and_a_split(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:me/talks", "hub:me/talks:test"):
        assert len(list(read_rows(source, "auto", "data.train"))) == 8
    assert asked == [("me/talks", "train"), ("me/talks", "test")]


def test_text_is_read_by_paragraphs_or_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree\n")
    assert [(r.where, r.values["text"]) for r in read_rows(str(file), "auto", "x")] == [
        (f"{file}:1", "one\ntwo"),
        (f"{file}:4", "three"),
    ]
    file.write_text("one\ntwo\n")
    assert [r.values["text"] for r in read_rows(str(file), "auto", "x")] == ["one", "two"]


def test_faulty_lines_keep_their_number(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,2\n3\n4,5,6\n"x\ny",7\n')
    found = [(r.where.rpartition(":")[2], r.fault) for r in read_rows(str(file), "auto", "x")]
    assert found == [
        ("2", ""),
        ("3", "fewer values than the first line has columns"),
        ("4", "more values than the 2 columns of the first line"),
        ("6", ""),
    ]


@pytest.mark.parametrize(
    ("content", "format", "expected"),
    [
        (b"x", "auto", "format of .bin is not known"),
        (b"x", "parquet", "cannot be read as Parquet"),
        (b"\xff\xfe\x00", "jsonl", "is not UTF-8"),
        (b"{}", "json", "0 lists"),
        (b"x", "images", "needs a folder"),
    ],
)
def test_files_that_cannot_be_read(content, format, expected, tmp_path):
    file = tmp_path / "d.bin"
    file.write_bytes(content)
    with pytest.raises(ContractError, match=expected):
        list(read_rows(str(file), format, "data.train"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def trained(model, rows, tmp_path, **data):
    file = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    values = cases.recipe(
        model, "sft", file, tmp_path / "run", data=data, training={"max_steps": 1, "samples": 0}
    )
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    return printed, json.loads((tmp_path / "run" / "data.json").read_text())


def test_bad_truncated_and_masked_rows_are_counted(model, tmp_path, one_thread):
    rows = [
        *ROWS,
        {"prompt": "x", "completion": "y" * 100},  # truncated
        {"prompt": "x" * 100, "completion": "y"},  # truncated, and nothing is left of the answer
        {"prompt": "x"},
    ]
    printed, facts = trained(model, rows, tmp_path, max_bad_rows=2)
    counts = facts["train"]
    assert (counts["read"], counts["used"], counts["bad"]) == (11, 9, 2)
    assert (counts["truncated"], counts["masked"]) == (2, 1)
    assert [row.partition("d.jsonl:")[2][:3] for row in counts["bad_rows"]] == ["10:", "11:"]
    assert "2 truncated, 1 fully masked, 2 bad" in printed
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| truncated | 2 |" in report
    assert "d.jsonl:11: no column 'completion'" in report


def test_long_rows_can_be_dropped_or_refused(model, tmp_path, one_thread):
    rows = [*ROWS, {"prompt": "x", "completion": "y" * 100}]
    _, facts = trained(model, rows, tmp_path, truncation="drop")
    assert (facts["train"]["used"], facts["train"]["truncated"]) == (8, 1)
    file = cases.write_recipe(
        tmp_path / "r2.yaml", cases.recipe(model, "sft", tmp_path / "d.jsonl", tmp_path / "run2")
    )
    printed = cases.run("train", file, "data.truncation=error", code=1)
    assert "d.jsonl:9 has 105 tokens, more than training.seq_len=64" in printed


def test_columns_are_renamed(model, tmp_path, one_thread):
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    columns = {"prompt": "q", "completion": "a"}
    printed, _ = trained(model, rows, tmp_path, columns=columns)
    assert "sample: <u>say a</s><a>«aaa</s>»" in printed
    file = cases.write_recipe(
        tmp_path / "r2.yaml", cases.recipe(model, "sft", tmp_path / "d.jsonl", tmp_path / "run2")
    )
    printed = cases.run("train", file, "data.columns={prompt: q, completion: b}", code=1)
    assert (
        "d.jsonl:1: no column 'b', which data.columns.completion names (the row has 'q', 'a')"
        in printed
    )


def test_a_share_is_set_aside_by_the_seed(model, tmp_path, one_thread):
    _, facts = trained(model, ROWS, tmp_path, eval=0.25)
    assert (facts["train"]["used"], facts["eval"]["used"]) == (6, 2)
    assert facts["train"]["supervised"] == 6 * 4
