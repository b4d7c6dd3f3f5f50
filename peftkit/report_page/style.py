"""Colours and the style sheet of the pages."""

COLOURS = (
    ("#2f6fde", "#6ea3ff"),
    ("#d9822b", "#f0a35a"),
    ("#2e9e6b", "#5cc795"),
    ("#b0489b", "#df85cd"),
    ("#7a6ff0", "#a59bff"),
    ("#c2453c", "#f0827a"),
    ("#1797a6", "#56c5d2"),
    ("#8a7a1f", "#cbb94f"),
    ("#5f6b7a", "#9aa8b8"),
)
"""The colours of parts and curves, on a light and on a dark page."""

GREY = ("#b3bcc7", "#6b7684")
"""The colour of bars that are there for comparison."""

INK = ("#1c2128", "#e6edf3")
SOFT = ("#57606a", "#9da7b3")
RULE = ("#d5dbe1", "#343b44")
PAGE = ("#ffffff", "#12161b")
FILL = ("#f4f6f8", "#1b2129")

_LIGHT, _DARK = 0, 1


def variables(theme: int) -> str:
    """The colours of a theme as CSS variables."""
    named = {"ink": INK, "soft": SOFT, "rule": RULE, "page": PAGE, "fill": FILL, "grey": GREY}
    named |= {f"c{i}": colour for i, colour in enumerate(COLOURS)}
    return " ".join(f"--{name}: {colour[theme]};" for name, colour in named.items())


CHART = """
svg.chart text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
svg.chart .soft { fill: var(--soft); }
svg.chart .bold { font-weight: 600; }
svg.chart .rule { stroke: var(--rule); stroke-width: 1; }
svg.chart .mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg.chart .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .other { fill: var(--grey); }
""" + "".join(
    f"svg.chart .s{i} {{ stroke: var(--c{i}); }} svg.chart .f{i}, .swatch.f{i} {{ fill: var(--c{i}); background: var(--c{i}); }}\n"
    for i in range(len(COLOURS))
)
"""The style of the charts."""

THEMES = f":root {{ color-scheme: light dark; {variables(_LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {variables(_DARK)} }} }}\n"
"""The colours, by the reader's setting."""

SHEET = (
    THEMES
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, li { max-width: 48rem; }
p { margin: .5rem 0 1rem; }
.lead, figcaption, .note { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tiles div { flex: 1 1 9.5rem; background: var(--fill); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.tiles .wide { flex: 2 1 16rem; }
.tiles dt { font-size: 1.5rem; font-weight: 650; color: var(--c0); line-height: 1.2; }
.tiles dd { margin: .2rem 0 0; color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
table:not(.words) td:first-child, td[data-key] { white-space: nowrap; }
.words td { overflow-wrap: anywhere; min-width: 7rem; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--c0); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--c0); }
code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--fill); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
.command { display: flex; gap: .5rem; align-items: flex-start; margin: .4rem 0 1rem; }
.command pre { flex: 1; min-width: 0; margin: 0; padding: .6rem .8rem; background: var(--fill); border: 1px solid var(--rule);
  border-radius: 6px; overflow-x: auto; user-select: all; }
button, select, input[type=search] { font: inherit; font-size: .9rem; color: var(--ink); background: var(--fill); border: 1px solid var(--rule);
  border-radius: 6px; padding: .45rem .7rem; max-width: 100%; }
.filters { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; }
.filters label { display: flex; flex-direction: column; font-size: .8rem; color: var(--soft); min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; align-items: start; }
figure { margin: .5rem 0 1rem; max-width: 36rem; }
figcaption { font-size: .88rem; }
svg.chart { width: 100%; height: auto; display: block; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
summary { cursor: pointer; margin: .5rem 0; }
[hidden] { display: none !important; }
"""
    + CHART
)
"""The style sheet of a page."""
