"""The report of a run: its sections, and how they are written as Markdown, as HTML, and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.evaluate import parse, same_json
from demo.files import write_text
from demo.page import to_html
from demo.plots import draw
from demo.sections import Section, Table

_TITLES = {"peftkit": "peftkit", "peft": "plain PEFT", "full": "full fine-tuning"}
_SHOWN_SAMPLES = 6


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.md`` (with its plots in ``plots/``) and the self-contained ``report.html``."""
    sections = build(report)
    plots = draw(report)
    (folder / "plots").mkdir(exist_ok=True)
    for name, svg in plots.items():
        write_text(folder / "plots" / f"{name}.svg", svg)
    write_text(folder / "report.md", to_markdown(sections))
    write_text(folder / "report.html", to_html(_headline(report), sections, plots))


def print_report(report: dict[str, Any], console: Console, folder: Path) -> None:
    """Print the texts and tables of the report. Samples and plots are only in the files."""
    from rich.table import Table as RichTable
    from rich.text import Text

    for section in build(report):
        if not section.on_terminal:
            continue
        console.print(f"\n[bold]{section.title}[/]")
        for text in section.paragraphs:
            console.print(text, highlight=False, markup=False)
        for table in section.tables:
            shown = RichTable()
            for i, head in enumerate(table.head):
                shown.add_column(head, justify="left" if i == 0 or table.prose else "right")
            for row in table.rows:
                shown.add_row(*map(Text, row))
            console.print(shown)
    console.print()
    for name, path in (("report", "report.html"), ("", "report.md"), ("adapter", "adapter")):
        console.print(f"{name:8}{folder / path}", highlight=False, markup=False, soft_wrap=True)


def build(report: dict[str, Any]) -> list[Section]:
    """Return the sections of the report, in order."""
    sections = [_result(report), _proof(report), _training(report), _methods(report)]
    return [*sections, _samples(report), _environment(report), _commands()]


def _headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, as pairs (number, description)."""
    match = report["exact_match"]
    agree = report["plain_peft_agrees"] and report["merged_agrees"]
    return [
        (_percent(match["base"]), "exact match before"),
        (_percent(match["tuned"]), "exact match after"),
        (_duration(report["seconds"]), "in total, including the evaluation"),
        ("yes" if agree else "NO", "plain PEFT and the merged model agree"),
    ]


def _result(report: dict[str, Any]) -> Section:
    base, tuned = report["scores"]["base"], report["scores"]["tuned"]
    settings = report["settings"]
    rows = [
        [title, _percent(base[key]), _percent(tuned[key])]
        for title, key in (
            ("exact match", "exact_match"),
            ("correct fields", "fields"),
            ("valid JSON", "valid_json"),
        )
    ]
    intents = [
        [intent, _percent(base["by_intent"][intent]), _percent(tuned["by_intent"][intent])]
        for intent in tuned["by_intent"]
    ]
    text = (
        f"SmolLM2-135M-Instruct before and after training with LoRA, on {settings['held_out_pairs']} held-out requests. Their "
        "sentence patterns and values (names, places, things, dates, numbers) never occur in training. An answer is an exact "
        "match if it parses to exactly the wanted JSON record. The base model gets the same prompt, but it cannot know the "
        "schema; its number is the starting point of the training, and says little about the base model."
    )
    head = ["", "before", "after"]
    return Section(
        "Result", [text], [Table(head, rows), Table(["intent", *head[1:]], intents)], "exact_match"
    )


def _proof(report: dict[str, Any]) -> Section:
    proof = report["proof"]
    rows = []
    for title, key, verdict in (
        ("plain PEFT, new process", "plain", report["plain_peft_agrees"]),
        ("merged model", "merged", report["merged_agrees"]),
    ):
        result = proof[key]
        texts = f"{result['same_texts']} of {proof['prompts']}"
        errors = f"{result['logit_error']:.1e} ({result['plain_logit_error']:.1e})"
        rows.append([title, texts, errors, "agrees" if verdict else "DISAGREES"])
    text = (
        "A new process without peftkit loads the saved adapter with PEFT, then merges it into the base model. It decodes texts "
        "with transformers' generate. The logit error is the largest difference from plain PEFT in float64 over "
        f"{proof['scored_tokens']} tokens; the number in brackets is the error of plain PEFT in float32. Logits agree if the "
        "error is at most twice this number. The row of plain PEFT shows the error of peftkit's logits."
    )
    head = ["", "same texts", "logit error (plain PEFT)", "verdict"]
    return Section("Is it still PEFT?", [text], [Table(head, rows)])


def _training(report: dict[str, Any]) -> Section:
    training, settings = report["training"], report["settings"]
    steps = training["steps"]
    tokens = sum(step["tokens"] for step in steps)
    seconds = report["seconds_by_phase"]
    draws = settings["steps"] * settings["batch_size"]
    text = (
        f"LoRA r={settings['lora_r']}, lora_alpha={settings['lora_alpha']} on every linear layer: "
        f"{training['trainable']:,} of {training['total']:,} parameters "
        f"({100 * training['fused_fraction']:.0f} % of the adapter layers are fused). {settings['steps']} steps of "
        f"{settings['batch_size']} requests, {tokens:,} tokens: {draws:,} draws from {settings['train_pairs']:,} training "
        f"requests. The loss is {steps[0]['loss']:.3f} at the first step and {_last_losses(steps):.3f} over the last ten steps."
    )
    names = {
        "startup": "imports",
        "unpack": "unpacking the weights",
        "base": "evaluation before",
        "training": "training",
        "tuned": "evaluation after",
        "proof": "proof",
    }
    rows = [[names[name], f"{value:.1f}"] for name, value in seconds.items()]
    rows.append(["total", f"{report['seconds']:.1f}"])
    return Section("Training", [text], [Table(["phase", "seconds"], rows)], "loss")


def _last_losses(steps: Sequence[dict[str, float]]) -> float:
    last = [step["loss"] for step in steps[-10:]]
    return sum(last) / len(last)


def _methods(report: dict[str, Any]) -> Section:
    runs, settings = report["runs"], report["settings"]
    rows = [
        [
            _TITLES[name],
            f"{run['step_seconds']:.2f}",
            f"{run['tokens_per_second']:.0f}",
            f"{run['peak_bytes'] / 2**20:,.0f}",
            f"{run['trainable']:,}",
        ]
        for name, run in runs.items()
    ]
    if len(runs) > 1:
        text = (
            f"Medians of {settings['compare_steps']} steps of each method, after two steps that are not timed. All methods get "
            "the same batches in the same order. Each method runs in a separate process, one after the other. Peak memory is "
            "relative to the loaded model."
        )
    else:
        text = "From the training run itself; the comparison was skipped."
    head = ["method", "seconds per step", "tokens/s", "peak memory, MiB", "trainable"]
    plot = "methods" if len(runs) > 1 else None
    return Section("Methods side by side", [text], [Table(head, rows)], plot)


def _samples(report: dict[str, Any]) -> Section:
    def right(sample: dict[str, str]) -> bool:
        return same_json(parse(sample["tuned"]), json.loads(sample["wanted"]))

    samples = report["samples"]
    wrong = [sample for sample in samples if not right(sample)]
    texts = [
        f"The first {_SHOWN_SAMPLES} held-out requests, then all requests that the tuned model got wrong ({len(wrong)})."
    ]
    head = ["request", "before", "after", "wanted"]
    rows = [
        [
            sample["request"],
            _clip(sample["base"]),
            sample["tuned"],
            "✓" if right(sample) else sample["wanted"],
        ]
        for sample in [
            *samples[:_SHOWN_SAMPLES],
            *(s for s in wrong if s not in samples[:_SHOWN_SAMPLES]),
        ]
    ]
    return Section("Samples", texts, [Table(head, rows, prose=True)], on_terminal=False)


def _clip(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _environment(report: dict[str, Any]) -> Section:
    rows = [[name.replace("_", " "), str(value)] for name, value in report["environment"].items()]
    return Section("Environment", [], [Table(["", ""], rows, prose=True)], on_terminal=False)


def _commands() -> Section:
    text = (
        "`make demo` makes this report. `ARGS=--resume` continues after Ctrl-C, `ARGS=--no-compare` skips plain PEFT and full "
        'fine-tuning, and `ARGS="--json FILE"` writes the numbers as JSON. Plain PEFT can load the adapter in `adapter/`: '
        '`AutoPeftModelForCausalLM.from_pretrained("adapter")`.'
    )
    return Section("Commands", [text], [], on_terminal=False)


def to_markdown(sections: Sequence[Section]) -> str:
    """Return the report as Markdown. Plots are links to files in ``plots/``."""
    parts = ["# Demo of peftkit: English requests to JSON records"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        parts += [_markdown_table(table) for table in section.tables]
        if section.plot:
            parts.append(f"![{section.title}](plots/{section.plot}.svg)")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = [":--" if i == 0 or table.prose else "--:" for i in range(len(table.head))]
    code = (
        table.prose and len(table.head) > 2
    )  # the table of samples, whose JSON must not be markup
    rows = [
        [row[0], *(f"`{c}`" if code and c != "✓" else c for c in row[1:])] for row in table.rows
    ]
    return "\n".join([line(table.head), line(rule), *map(line, rows)])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
