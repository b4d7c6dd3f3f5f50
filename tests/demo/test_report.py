"""The report from fixed data: Markdown, the page and the charts."""

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from demo.report import build, print_report, to_markdown, write_report


@pytest.fixture
def report():
    """What a run hands to its report, made up."""
    run = {
        "step_seconds": 1.25,
        "tokens_per_second": 333.0,
        "peak_bytes": 300 * 2**20,
        "trainable": 4884480,
    }
    base = {
        "exact_match": 0.0,
        "valid_json": 0.1,
        "fields": 0.02,
        "by_intent": {"alarm": 0.0, "timer": 0.0},
    }
    tuned = {
        "exact_match": 0.95,
        "valid_json": 1.0,
        "fields": 0.98,
        "by_intent": {"alarm": 0.9, "timer": 1.0},
    }
    agreement = {
        "same_texts": 24,
        "logit_error": 1.5e-5,
        "plain_logit_error": 1.4e-5,
        "logits_agree": True,
    }
    return {
        "exact_match": {"base": 0.0, "tuned": 0.95},
        "seconds": 305.4,
        "plain_peft_agrees": True,
        "merged_agrees": True,
        "runs": {
            "peftkit": run,
            "peft": {**run, "step_seconds": 2.5},
            "full": {**run, "step_seconds": 3.0, "trainable": 134515008},
        },
        "environment": {
            "processor": "A <CPU>",
            "instruction sets": "AVX2",
            "memory": "7.6 GiB",
            "date": "2026-01-02 03:04 UTC",
            "commit": "0123456789ab",
            "peftkit": "0.1.0",
        },
        "estimate": {"training": 290.0},
        "shorter": {},
        "commands": {
            "repeat": "make demo",
            "recipe": ".venv/bin/peftkit train --init sft recipe.yaml",
            "train": ".venv/bin/peftkit train recipe.yaml",
            "generate": '.venv/bin/peftkit generate runs/mine "a <prompt>"',
            "plan": ".venv/bin/peftkit plan x",
        },
        "settings": {
            "seed": 7,
            "learning_rate": 3e-3,
            "scheduler": "linear",
            "warmup_steps": 16,
            "held_out_pairs": 300,
            "train_pairs": 3000,
            "steps": 2,
            "batch_size": 8,
            "lora_r": 16,
            "lora_alpha": 32,
            "compare_steps": 6,
        },
        "seconds_by_phase": {"startup": 5.0, "training": 300.4},
        "scores": {"base": base, "tuned": tuned},
        "training": {
            "steps": [
                {"loss": 2.0, "seconds": 1.0, "tokens": 400},
                {"loss": 0.5, "seconds": 1.2, "tokens": 420},
            ],
            "trainable": 4884480,
            "total": 139399488,
            "fused_fraction": 1.0,
        },
        "proof": {"plain": agreement, "merged": agreement, "prompts": 24, "scored_tokens": 250},
        "samples": [
            {
                "request": "Wake me | up <now>",
                "wanted": '{"a":1}',
                "base": "\n no idea " * 20,
                "tuned": '{"a":1.0}',
            },
            *[
                {"request": f"r{i}", "wanted": '{"a":1}', "base": "", "tuned": '{"a":1}'}
                for i in range(6)
            ],
            {"request": "The wrong one", "wanted": '{"a":1}', "base": "", "tuned": '{"a":2}'},
        ],
    }


def test_markdown_has_the_figures_and_links_its_plots(report, tmp_path):
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| exact match | 0.0 % | 95.0 % |" in text
    assert "| plain PEFT | 2.50 | 0.50 | 333 | 300 | 1.00 | 4,884,480 |" in text
    assert "| full fine-tuning | 3.00 | 0.42 | 333 | 300 | 1.00 | 134,515,008 |" in text
    assert "24 of 24" in text
    assert "The wrong one" in text
    assert "got wrong (1)" in text
    assert "Wake me \\| up <now>" in text
    links = re.findall(r"\]\((plots/\w+\.svg)\)", text)
    assert len(links) == 4
    for link in links:
        assert ElementTree.fromstring((tmp_path / link).read_text()).tag.endswith("svg")


def test_page_is_self_contained_and_escaped(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;CPU&gt;" in page
    assert "up &lt;now&gt;" in page
    assert "5.1 min" in page
    assert not re.search(r"(src|href)=", page)
    assert "http" not in page
    assert page.count("<svg") == 4
    assert len(page) < 60_000


def test_page_starts_with_the_result_the_comparison_and_right_answers(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    order = [
        "0.0 % → 95.0 %",
        "Against plain PEFT and full fine-tuning",
        "One step of each method",
        "Three answers",
        "make demo</pre>",
        "recipe.yaml",
        "The result in detail",
        "differs by no more than rounding",
        "1.5e-05",
        "The wrong one",
        "AVX2",
    ]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert "seed 7, learning rate 0.003" in page
    assert "2026-01-02 03:04 UTC with commit 0123456789ab" in page
    assert ">full fine-tuning</text>" in page


def test_a_wrong_verdict_is_seen(report):
    report["proof"]["merged"] = {**report["proof"]["merged"], "logits_agree": False}
    report["merged_agrees"] = False
    text = to_markdown(build(report))
    assert "| merged model | NO | 24 of 24 | DIFFERS |" in text
    assert "| plain PEFT, new process | yes | 24 of 24 | differs by no more than rounding |" in text


def test_a_shorter_run_says_so(report):
    report["shorter"] = {"steps": 200, "held_out_pairs": 100}
    assert "steps 200 instead of 300, held-out requests 100 instead of 300" in to_markdown(
        build(report)
    )


def test_report_without_comparison_says_so(report):
    report["runs"] = {"peftkit": report["runs"]["peftkit"]}
    text = to_markdown(build(report))
    assert "the comparison was skipped" in text
    assert "plots/methods.svg" not in text


def test_terminal_gets_the_tables_and_where_the_files_are(report, tmp_path):
    console = Console(width=120, record=True, file=io.StringIO())
    report["merged_agrees"] = False
    print_report(report, console, tmp_path)
    text = console.export_text()
    assert "95.0 %" in text
    assert "NO" in text
    assert "report.html" in text
    assert "The wrong one" not in text
