"""The page of all results: every row is on it, from JSON lines and older files, and a browser can sort and filter it."""

import json
import re

import pytest
from browser import in_browser  # noqa: F401
from test_benchmarks import load_script


def row(provider, seconds, **changes):
    """A JSON line of a results file."""
    library, _, method = provider.partition(" ")
    environment = {
        "device": "A <CPU>",
        "versions": {"torch": "2.13"},
        "commit": "abc",
        "date": "today",
    }
    made = {
        "suite": "methods",
        "case": "tiny",
        "provider": provider,
        "library": library,
        "method": method,
    }
    made |= {
        "batch": 2,
        "length": 128,
        "rank": 16,
        "checkpointing": False,
        "status": "ok",
        "reason": None,
    }
    made |= {
        "step_seconds": seconds,
        "step_spread": [0.9, 1.2],
        "tokens_per_second": 100.0,
        "peak_bytes": 2**30,
    }
    made |= {"trainable": 7, "losses": [2.0, 1.5], "environment": environment}
    return {**made, **changes}


ROWS = [
    row("peftkit lora", 1.0),
    row("PEFT lora", 2.5, peak_bytes=3 * 2**30),
    row("torch full", 4.0),
    row(
        "Unsloth lora",
        None,
        status="absent",
        reason="not installed <here>",
        peak_bytes=None,
        losses=None,
        step_spread=None,
    ),
    *(row("peftkit lora", length / 1000, suite="scaling", length=length) for length in (256, 512)),
]


@pytest.fixture
def scripts():
    """benchmarks/results_page.py and the reader of rows that it uses."""
    page = load_script("results_page")
    return page, page.rows


@pytest.fixture
def folder(tmp_path):
    lines = "".join(json.dumps(one) + "\n" for one in ROWS)
    (tmp_path / "cpu.jsonl").write_text(lines + "\n")
    return tmp_path


def test_every_row_is_on_the_page(scripts, folder):
    page, read = scripts
    found = read(folder)
    assert found == ROWS
    text = page.text(found)
    assert text.count("data-suite=") == len(ROWS)
    assert "not installed &lt;here&gt;" in text
    assert "A &lt;CPU&gt;" in text
    assert "A <CPU>" not in text
    assert not re.search(r"\b(src|href)=|https?://", text)


def test_lora_or_full_is_one_picture_with_time_and_memory(scripts, folder):
    page, read = scripts
    ((place, chart), *_) = page.comparisons(read(folder)).items()
    assert place == ("A <CPU>", "tiny, 2 x 128 tokens")
    times, memory = chart.groups
    assert [(bar.label, bar.text) for bar in times.bars] == [
        ("LoRA with peftkit", "1.00 s"),
        ("LoRA with PEFT", "2.50 s"),
        ("full fine-tuning", "4.00 s"),
    ]
    assert [bar.strong for bar in times.bars] == [True, False, False]
    assert [bar.text for bar in memory.bars] == ["1.00 GiB", "3.00 GiB", "1.00 GiB"]


def test_the_page_says_first_whether_lora_or_full(scripts, folder):
    page, read = scripts
    text = page.text(read(folder))
    said = "LoRA with peftkit takes 0.25 x the time and 1.00 x the memory of full fine-tuning: 1.00 s against 4.00 s a step."
    assert said in text
    assert text.index(said) < text.index("<svg") < text.index("measured steps")
    assert "takes" not in page.text([ROWS[0], ROWS[1]])


def test_a_page_without_a_speed_says_why(scripts):
    page, _ = scripts
    text = page.text([row("peftkit lora", None, status="refused", reason="the machine was busy")])
    assert "No step has a speed that may be shown. The first reason: the machine was busy." in text
    assert "<svg" not in text


def test_a_page_of_some_rows_has_their_target(scripts, tmp_path):
    page, _ = scripts
    target = {"reached": True, "steps": 20, "seconds": 2.5, "held_out": [[20, 2.9]]}
    page.write([row("peftkit lora", 1.0, target=target, target_loss=3.0)], tmp_path / "page.html")
    assert "2.5, 20 steps (loss 3)" in (tmp_path / "page.html").read_text()


def test_time_by_length_is_a_curve(scripts, folder):
    page, read = scripts
    (chart,) = page.scalings(read(folder)).values()
    assert [(line.label, line.x, line.y) for line in chart.lines] == [
        ("LoRA with peftkit", [256, 512], [0.256, 0.512])
    ]


def test_a_row_of_another_rank_is_no_point_of_the_curve(scripts, folder):
    page, read = scripts
    found = read(folder)
    (chart,) = page.scalings(found).values()
    other = [{**r, "rank": 512, "step_seconds": 9.0} for r in found if r["suite"] == "scaling"][-1:]
    assert other
    (same,) = page.scalings([*found, *other]).values()
    assert [line.y for line in same.lines] == [line.y for line in chart.lines]


def test_committed_results_are_read(scripts):
    page, read = scripts
    found = read(page.RESULTS)
    text = page.text(found)
    assert len(found) == text.count("data-suite=")
    gpu = [r for r in found if r["environment"]["device"] == "NVIDIA H100 80GB"]
    assert {"full", "lora", "dora"} <= {r["method"] for r in gpu}
    best = min(r["step_seconds"] for r in gpu if r["library"] == "peftkit")
    assert best == 0.0788
    assert "8 layers of Llama-3.1-8B, 1 x 4096 tokens on NVIDIA H100 80GB" in text


def test_a_broken_line_is_named(scripts, folder):
    _, read = scripts
    with (folder / "cpu.jsonl").open("a") as file:
        file.write("{half\n")
    with pytest.raises(SystemExit, match=r"cpu\.jsonl, line 8: not JSON"):
        read(folder)
    (folder / "cpu.jsonl").write_text('{"suite": "methods"}\n')
    with pytest.raises(SystemExit, match="line 1: a row needs case, status, environment"):
        read(folder)


def test_the_command_writes_page_and_charts(scripts, folder, tmp_path, monkeypatch, capsys):
    page, _ = scripts
    monkeypatch.setattr(page, "RESULTS", folder)
    parser = page.argparse.ArgumentParser()
    page.add_options(parser)
    out, plots = tmp_path / "out" / "page.html", tmp_path / "plots"
    page.run(parser.parse_args(["--out", str(out), "--plots", str(plots)]))
    assert out.read_text().startswith("<!doctype html>")
    names = {file.name for file in plots.iterdir()}
    assert "lora-or-full-tiny-2-x-128-tokens-a-cpu.svg" in names
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(names)


def test_no_results_are_said(scripts, tmp_path):
    page, read = scripts
    assert "There are no results yet" in page.text(read(tmp_path))


def test_in_a_browser_the_table_sorts_and_filters_and_fits_a_phone(scripts, folder, in_browser):  # noqa: F811
    page, read = scripts
    text = page.text(read(folder))
    script = """(() => {
      const rows = () => [...document.querySelectorAll("[data-table=results] tbody tr")].filter(r => !r.hidden);
      const width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
      document.querySelectorAll("[data-table=results] th button")[7].click();
      const sorted = rows().map(r => r.cells[7].textContent);
      const select = document.querySelector("[data-filters=results] select[data-key=status]");
      select.value = "absent"; select.dispatchEvent(new Event("change"));
      const seen = [...document.querySelectorAll("[data-figures=pictures] figure")].filter(f => !f.hidden).length;
      return [width, sorted, rows().map(r => r.cells[2].textContent), seen];
    })()"""
    width, order, left, seen = in_browser(text, script, width=390)
    assert width == [390, 390]
    assert order == ["256 ms", "512 ms", "1.00 s", "2.50 s", "4.00 s", ""]
    assert left == ["Unsloth"]
    assert seen == 1
