"""Draw the plots of the report as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE, _AFTER, _PEFTKIT = "#b8bec8", "#1f6feb", "#1f6feb"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b949e",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",  # keep text as text: the file has a tenth of the size and is searchable
    "svg.hashsalt": "peftkit",
}


def draw(report: dict[str, Any]) -> dict[str, str]:
    """Return the SVG by name: ``loss``, ``exact_match``, and ``methods`` if more than one method was measured."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(_STYLE):
        plots = {
            "loss": _loss(report["training"]["steps"]),
            "exact_match": _exact_match(report["scores"]),
        }
        if len(report["runs"]) > 1:
            plots["methods"] = _methods(report["runs"])
    return plots


def _loss(steps: Sequence[dict[str, float]]) -> str:
    figure, (left, right) = _figure(2, height=2.8)
    losses = [step["loss"] for step in steps]
    left.plot(range(1, len(losses) + 1), losses, color=_AFTER, linewidth=1.4)
    left.set(title="loss of each step", xlabel="step", yscale="log")
    speeds = [step["tokens"] / step["seconds"] for step in steps]
    right.plot(range(1, len(speeds) + 1), speeds, ".", color=_AFTER, markersize=4)
    right.set(title="tokens per second of each step", xlabel="step", ylim=(0, None))
    return _svg(figure)


def _exact_match(scores: dict[str, Any]) -> str:
    figure, (axes,) = _figure(1, height=3.2)
    intents = list(scores["tuned"]["by_intent"])
    for offset, which, colour in ((-0.2, "base", _BEFORE), (0.2, "tuned", _AFTER)):
        values = [100 * scores[which]["by_intent"].get(intent, 0.0) for intent in intents]
        places = [i + offset for i in range(len(intents))]
        axes.bar(places, values, width=0.4, color=colour, label=which)
    axes.set_xticks(range(len(intents)), intents, rotation=30, ha="right")
    axes.set(title="held-out requests answered exactly, by intent", ylabel="%", ylim=(0, 105))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure)


def _methods(runs: dict[str, Any]) -> str:
    figure, axes = _figure(3, height=2.6)
    names = list(runs)
    colours = [_PEFTKIT if name == "peftkit" else _BEFORE for name in names]
    measures = (
        ("seconds per step", "step_seconds", 1.0, "{:.2f}"),
        ("peak memory above the model, MiB", "peak_bytes", 2.0**20, "{:.0f}"),
        ("trainable parameters, millions", "trainable", 1e6, "{:.1f}"),
    )
    for one, (title, key, unit, form) in zip(axes, measures, strict=True):
        values = [runs[name][key] / unit for name in names]
        bars = one.bar(names, values, color=colours, width=0.6)
        one.bar_label(bars, [form.format(v) for v in values], padding=2)
        one.set_title(title, fontsize=10)
        one.margins(y=0.15)
        one.set_yticks([])
        one.spines["left"].set_visible(False)
    return _svg(figure)


def _figure(columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, transparent=False)
    return out.getvalue()
