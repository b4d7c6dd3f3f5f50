"""The report of a run: its sections, and how they are written as Markdown, as HTML, and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from demo import charts
from demo.compare import TITLES
from demo.evaluate import parse, same_json
from demo.files import write_text
from demo.page import to_html
from demo.progress import duration
from demo.sections import Command, Section, Table
from demo.settings import Settings
from peftkit.report_page import Tile, to_svg

TITLE = "A language model learns to turn English requests into JSON records"
PHASE_NAMES = {
    "startup": "imports",
    "unpack": "unpacking the weights",
    "calibration": "timing this machine",
    "base": "evaluation before training",
    "training": "training",
    "tuned": "evaluation after training",
    "proof": "check against plain PEFT",
    "comparison": "comparison",
}
"""The phases by the names of their results, as the report calls them."""
_SHOWN_SAMPLES = 3


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.md`` (with its plots in ``plots/``) and the self-contained ``report.html``."""
    sections = build(report)
    (folder / "plots").mkdir(exist_ok=True)
    for section in sections:
        for name, chart in section.charts.items():
            write_text(folder / "plots" / f"{name}.svg", to_svg(chart, file=True))
    write_text(folder / "report.md", to_markdown(sections))
    page = to_html(TITLE, _lead(report), _headline(report), sections)
    write_text(folder / "report.html", page)


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
    return [
        _methods(report),
        _answers(report),
        _repeat(report),
        _next_steps(report),
        _result(report),
        _proof(report),
        _training(report),
        _wrong(report),
        _environment(report),
    ]


def _lead(report: dict[str, Any]) -> str:
    settings, found = report["settings"], report["environment"]
    return (
        f"SmolLM2-135M-Instruct, fine-tuned with peftkit's LoRA in {settings['steps']} steps on {found.get('processor', 'a CPU')} "
        f"({found.get('date', 'no date')}), and compared with plain PEFT and full fine-tuning."
    )


def _headline(report: dict[str, Any]) -> list[Tile]:
    """Return the large figures at the top of the page."""
    match, runs = report["exact_match"], report["runs"]
    held_out = report["settings"]["held_out_pairs"]
    found = [
        Tile(
            f"{_percent(match['base'])} → {_percent(match['tuned'])}",
            f"of {held_out} held-out requests answered exactly, before → after training",
            wide=True,
        )
    ]
    for rival in ("peft", "full"):
        if rival in runs:
            ratio = runs["peftkit"]["step_seconds"] / runs[rival]["step_seconds"]
            found.append(Tile(f"{ratio:.2f} x", f"the step time of {TITLES[rival]}"))
    agree = report["plain_peft_agrees"] and report["merged_agrees"]
    words = "plain PEFT and the merged model give the same answers"
    found.append(Tile("yes" if agree else "NO", words))
    found.append(Tile(_duration(report["seconds"]), "in all, with evaluation and comparison"))
    return found


def _methods(report: dict[str, Any]) -> Section:
    runs, settings = report["runs"], report["settings"]
    own = runs["peftkit"]
    rows = [
        [
            TITLES[name],
            f"{run['step_seconds']:.2f}",
            f"{own['step_seconds'] / run['step_seconds']:.2f}",
            f"{run['tokens_per_second']:.0f}",
            f"{run['peak_bytes'] / 2**20:,.0f}",
            f"{own['peak_bytes'] / run['peak_bytes']:.2f}" if run["peak_bytes"] > 0 else "",
            f"{run['trainable']:,}",
        ]
        for name, run in runs.items()
    ]
    if len(runs) > 1:
        text = (
            f"The medians of {settings['compare_steps']} steps of each method, after two steps that are not timed. All methods get "
            "the same batches in the same order. Each runs in a process of its own, one after the other. Peak memory is what "
            "training adds to the loaded model. Ratios are those of peftkit to the method; below 1 peftkit needs less."
        )
        found = {"methods": charts.methods(runs)}
    else:
        text = "From the training run itself; the comparison was skipped."
        found = {}
    head = ["method", "seconds per step", "time ratio", "tokens/s", "peak memory, MiB"]
    table = Table([*head, "memory ratio", "trained parameters"], rows)
    return Section("Against plain PEFT and full fine-tuning", [text], [table], found)


def _answers(report: dict[str, Any]) -> Section:
    samples = report["samples"]
    right = [sample for sample in samples if _is_right(sample)]
    shown = (right or samples)[:_SHOWN_SAMPLES]
    text = (
        f"The first {len(shown)} requests that the tuned model answers exactly. It saw neither their sentence patterns nor their "
        "names, places and numbers in training."
        if right
        else "The tuned model answers no request exactly. These are the first of its answers."
    )
    rows = [[s["request"], _clip(s["base"]), s["tuned"]] for s in shown]
    head = ["request", "before training", "after training"]
    table = Table(head, rows, prose=True, code=(1, 2))
    return Section("Three answers", [text], [table], on_terminal=False)


def _repeat(report: dict[str, Any]) -> Section:
    found, settings = report["environment"], report["settings"]
    origin = f"commit {found['commit']}, " if "commit" in found else ""
    text = (
        f"Made on {found.get('date', 'an unknown date')} with {origin}peftkit {found.get('peftkit')}: seed {settings['seed']}, learning rate "
        f"{settings['learning_rate']:g} ({settings['scheduler']}, {settings['warmup_steps']} steps of warm-up), "
        f"{settings['steps']} steps of {settings['batch_size']} requests, LoRA r={settings['lora_r']}, "
        f"lora_alpha={settings['lora_alpha']}."
    )
    if report["shorter"]:
        text += f" The run was made shorter for this machine: {shorter_text(report['shorter'], Settings())}."
    words = "In a copy of the project, this command repeats it:"
    command = Command(words, report["commands"]["repeat"])
    return Section("Repeat it", [text], commands=[command], on_terminal=False)


def _next_steps(report: dict[str, Any]) -> Section:
    commands = report["commands"]
    texts = [
        "A recipe names the model, the data and what is trained. Rows are JSON lines such as "
        '`{"prompt": "...", "completion": "..."}`, or chats with `messages`.'
    ]
    found = [
        Command("Write a recipe with a comment for every key:", commands["recipe"]),
        Command("Train this model on your rows in `my-data.jsonl`:", commands["train"]),
        Command("Ask the tuned model:", commands["generate"]),
        Command("See what fits on a card before anything is downloaded:", commands["plan"]),
        Command(
            "Use the adapter of this demo from Python, with plain PEFT:",
            'AutoPeftModelForCausalLM.from_pretrained("adapter")',
        ),
    ]
    return Section("Next: your own data", texts, commands=found, on_terminal=False)


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
    text = (
        f"SmolLM2-135M-Instruct before and after training with LoRA, on {settings['held_out_pairs']} held-out requests. Their "
        "sentence patterns and values (names, places, things, dates, numbers) never occur in training. An answer is an exact "
        "match if it parses to exactly the wanted JSON record. The base model gets the same prompt, but it cannot know the "
        "schema; its number is the starting point of the training, and says little about the base model."
    )
    table = Table(["", "before", "after"], rows)
    found = {"exact_match": charts.exact_match(report["scores"])}
    return Section("The result in detail", [text], [table], found)


def _proof(report: dict[str, Any]) -> Section:
    proof = report["proof"]
    rows = []
    for title, key, agrees in (
        ("plain PEFT, new process", "plain", report["plain_peft_agrees"]),
        ("merged model", "merged", report["merged_agrees"]),
    ):
        result = proof[key]
        texts = f"{result['same_texts']} of {proof['prompts']}"
        verdict = "differs by no more than rounding" if result["logits_agree"] else "DIFFERS"
        error, allowed = result["logit_error"], result["plain_logit_error"]
        rows.append(
            [title, "yes" if agrees else "NO", texts, verdict, f"{error:.1e}", f"{allowed:.1e}"]
        )
    text = (
        "A new process without peftkit loads the saved adapter with PEFT, then merges it into the base model. It decodes texts "
        "with transformers' generate, and compares logits. The first figure is the largest difference of the logits from plain PEFT "
        f"computed in float64, over {proof['scored_tokens']} tokens; the second is that of plain PEFT in float32, which is rounding "
        "alone. At most twice the second counts as rounding. The row of plain PEFT shows the difference of peftkit's logits."
    )
    head = ["", "agrees", "same texts", "logits", "difference", "of plain PEFT"]
    return Section("Is it still PEFT?", [text], [Table(head, rows)])


def _training(report: dict[str, Any]) -> Section:
    training, settings = report["training"], report["settings"]
    steps = training["steps"]
    tokens = sum(step["tokens"] for step in steps)
    draws = settings["steps"] * settings["batch_size"]
    text = (
        f"LoRA r={settings['lora_r']}, lora_alpha={settings['lora_alpha']} on every linear layer: "
        f"{training['trainable']:,} of {training['total']:,} parameters "
        f"({100 * training['fused_fraction']:.0f} % of the adapter layers are fused). {settings['steps']} steps of "
        f"{settings['batch_size']} requests, {tokens:,} tokens: {draws:,} draws from {settings['train_pairs']:,} training "
        f"requests. The loss is {steps[0]['loss']:.3f} at the first step and {_last_losses(steps):.3f} over the last ten steps."
    )
    estimated = report["estimate"]
    rows = [
        [PHASE_NAMES[name], f"{value:.1f}", f"{estimated[name]:.0f}" if name in estimated else ""]
        for name, value in report["seconds_by_phase"].items()
    ]
    rows.append(["in all", f"{report['seconds']:.1f}", ""])
    table = Table(["phase", "seconds", "estimated before"], rows)
    found = {"loss": charts.loss(steps), "speed": charts.speed(steps)}
    return Section("Training", [text], [table], found)


def _last_losses(steps: Sequence[dict[str, float]]) -> float:
    last = [step["loss"] for step in steps[-10:]]
    return sum(last) / len(last)


def _is_right(sample: dict[str, str]) -> bool:
    return same_json(parse(sample["tuned"]), json.loads(sample["wanted"]))


def _wrong(report: dict[str, Any]) -> Section:
    wrong = [sample for sample in report["samples"] if not _is_right(sample)]
    if not wrong:
        return Section("Wrong answers", ["There are none."], on_terminal=False)
    rows = [[sample["request"], sample["tuned"], sample["wanted"]] for sample in wrong]
    table = Table(["request", "after training", "wanted"], rows, prose=True, code=(1, 2))
    text = f"All requests that the tuned model got wrong ({len(wrong)})."
    return Section("Wrong answers", [text], [table], on_terminal=False)


def _clip(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _environment(report: dict[str, Any]) -> Section:
    rows = [[name, str(value)] for name, value in report["environment"].items()]
    return Section("Machine and versions", [], [Table(["", ""], rows, True)], on_terminal=False)


def shorter_text(shorter: dict[str, int], whole: Settings) -> str:
    """What was made shorter: ``"steps 200 instead of 300"``."""
    names = {"held_out_pairs": "held-out requests", "compare_steps": "steps of each method"}
    return ", ".join(
        f"{names.get(name, name)} {value} instead of {getattr(whole, name)}"
        for name, value in shorter.items()
    )


def to_markdown(sections: Sequence[Section]) -> str:
    """Return the report as Markdown. Plots are links to files in ``plots/``."""
    parts = [f"# {TITLE}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        for command in section.commands:
            parts += [command.words, f"    {command.text}"]
        parts += [_markdown_table(table) for table in section.tables]
        parts += [f"![{chart.title}](plots/{name}.svg)" for name, chart in section.charts.items()]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = [":--" if i == 0 or table.prose else "--:" for i in range(len(table.head))]
    rows = [
        [f"`{cell}`" if i in table.code and cell else cell for i, cell in enumerate(row)]
        for row in table.rows
    ]
    return "\n".join([line(table.head), line(rule), *map(line, rows)])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds < 100 else f"{seconds / 60:.1f} min"
