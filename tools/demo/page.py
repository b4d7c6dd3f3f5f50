"""Render the report as a single HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape

from demo.sections import Section, Table

_CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --fill: #f6f8fa; --blue: #1f6feb; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0 1rem; max-width: 46rem; color: var(--soft); }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 0; }
.headline div { background: var(--fill); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem; }
.headline dt { font-size: 1.6rem; font-weight: 600; color: var(--blue); }
.headline dd { margin: 0; color: var(--soft); font-size: .9rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .25rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child, .prose th, .prose td { text-align: left; }
.prose td { overflow-wrap: anywhere; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--fill); padding: .1em .3em;
  border-radius: 4px; }
img { width: 100%; max-width: 58rem; margin-top: .5rem; }
"""


def to_html(
    headline: Sequence[tuple[str, str]], sections: Sequence[Section], plots: Mapping[str, str]
) -> str:
    """Render the page.

    Args:
        headline: Pairs (number, description) for the top of the page.
        sections: The sections of the report.
        plots: The plots as SVG, by the names that the sections use.
    """
    boxes = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in headline)
    body = "\n".join(_section(section, plots) for section in sections)
    title = "Demo of peftkit: English requests to JSON records"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<dl class="headline">{boxes}</dl>\n{body}\n</body>\n</html>\n'
    )


def _section(section: Section, plots: Mapping[str, str]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{_inline(text)}</p>" for text in section.paragraphs]
    if section.tables:
        parts.append(f'<div class="tables">{"".join(map(_table, section.tables))}</div>')
    if section.plot:
        data = base64.b64encode(plots[section.plot].encode()).decode()
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/svg+xml;base64,{data}">')
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _inline(text: str) -> str:
    """Escape the text, and show text between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _table(table: Table) -> str:
    code = table.prose and len(table.head) > 2  # the table of samples, whose JSON is shown as code

    def cell(i: int, text: str) -> str:
        shown = escape(text, quote=False)
        return (
            f"<td><code>{shown}</code></td>"
            if code and i > 0 and text != "✓"
            else f"<td>{shown}</td>"
        )

    head = "".join(f"<th>{escape(h)}</th>" for h in table.head)
    head = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    rows = "".join(
        f"<tr>{''.join(cell(i, c) for i, c in enumerate(row))}</tr>" for row in table.rows
    )
    kind = ' class="prose"' if table.prose else ""
    return f"<table{kind}>{head}<tbody>{rows}</tbody></table>"
