"""The report from fixed data: Markdown, the page and the plots."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from demo.plots import draw
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
        "environment": {"cpu": "A <CPU>", "cores": 2},
        "settings": {
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
    assert "| plain PEFT | 2.50 | 333 | 300 | 4,884,480 |" in text
    assert "| full fine-tuning | 3.00 | 333 | 300 | 134,515,008 |" in text
    assert "24 of 24" in text
    assert "Wake me \\| up <now>" in text
    assert "The wrong one" in text
    assert "got wrong (1)" in text
    links = re.findall(r"\]\((plots/\w+\.svg)\)", text)
    assert len(links) == 3
    assert all((tmp_path / link).is_file() for link in links)


def test_page_is_self_contained_and_escaped(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;CPU&gt;" in page
    assert "up &lt;now&gt;" in page
    assert "5 min 05 s" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 3
    for image in images:
        assert ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")
    assert len(page) < 200_000


def test_plots_are_the_same_for_the_same_data(report):
    assert draw(report) == draw(report)
    assert "400" not in draw(report)["methods"]
    assert ">2.50<" in draw(report)["methods"]


def test_report_without_comparison_says_so(report):
    report["runs"] = {"peftkit": report["runs"]["peftkit"]}
    assert "the comparison was skipped" in to_markdown(build(report))
    assert "methods" not in draw(report)


def test_terminal_gets_the_tables_and_where_the_files_are(report, tmp_path):
    console = Console(width=120, record=True, file=io.StringIO())
    report["merged_agrees"] = False
    print_report(report, console, tmp_path)
    text = console.export_text()
    assert "95.0 %" in text
    assert "DISAGREES" in text
    assert "report.html" in text
    assert "The wrong one" not in text
