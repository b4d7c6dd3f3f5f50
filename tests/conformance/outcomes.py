"""Compare the outcomes of two runs of PEFT's tests, and write the comparison as Markdown."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from known import KNOWN
from own_types import NAMES, method_of

_ROUNDING = (
    "allows less error than the rounding of oneDNN's matrix product, which peftkit uses on this processor; "
    "passes with fused layers and PyTorch's own matrix product"
)


@dataclass
class Results:
    """The results of one run: outcomes by test id, the number of fused layers, and the reasons for skipped tests."""

    outcomes: dict[str, str]
    fused_layers: int
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    stock: Results
    fused: Results
    regressions: list[str]
    """Tests that pass with stock layers and not with fused layers, for no known reason."""
    explained: list[str]
    """Such tests with a reason in ``known.py``."""
    rounding: list[str]
    """Such tests that pass with torch's own matrix product, so that only the rounding differs."""
    gained: list[str]
    """Tests that pass with fused layers only."""

    def summary(self) -> str:
        """A few lines on how the runs differ, with the name of each unexplained test."""
        lines = [
            f"{mode}: {_counts(results.outcomes)}"
            for mode, results in (("stock", self.stock), ("fused", self.fused))
        ]
        lines.append(f"layers fused: {self.fused.fused_layers}")
        lines.append(f"pass with stock layers only: {len(self.regressions)} unexplained")
        lines += [f"  {test}: {self.fused.outcomes.get(test)}" for test in self.regressions]
        lines += [f"  {test}: known, {KNOWN[test]}" for test in self.explained]
        lines += [f"  {test}: rounding of the matrix product" for test in self.rounding]
        return "\n".join(lines)


def compare(stock: Results, fused: Results, torch_blas: Results | None = None) -> Comparison:
    """Find the tests whose outcome depends on the layers.

    Args:
        stock: PEFT's own layers.
        fused: Fused layers.
        torch_blas: Fused layers that multiply with PyTorch's own BLAS, run on the tests that are lost
            otherwise. A test that passes here allows less error than the rounding of oneDNN's matrix
            product, so fusing is not the cause of its failure.

    Raises:
        ValueError: One run has no outcomes, or the fused run fused nothing, so nothing can be compared.
    """
    if not stock.outcomes or not fused.outcomes:
        raise ValueError("no outcomes to compare; run both modes first")
    if fused.fused_layers == 0:
        raise ValueError("the fused run fused no layer, so it says nothing about fused layers")
    lost = sorted(
        test
        for test, outcome in stock.outcomes.items()
        if outcome == "passed" and fused.outcomes.get(test) != "passed"
    )
    gained = sorted(
        test
        for test, outcome in fused.outcomes.items()
        if outcome == "passed" and stock.outcomes.get(test) != "passed"
    )
    again = torch_blas.outcomes if torch_blas else {}
    rounding = [test for test in lost if test not in KNOWN and again.get(test) == "passed"]
    return Comparison(
        stock=stock,
        fused=fused,
        regressions=[test for test in lost if test not in KNOWN and test not in rounding],
        explained=[test for test in lost if test in KNOWN],
        rounding=rounding,
        gained=gained,
    )


def write(path: Path, comparison: Comparison, versions: dict[str, str]) -> None:
    """Write the comparison as Markdown into its part of the page."""
    _replace_part(path, "fused", _markdown(comparison, versions))


def write_own(path: Path, own: Results, versions: dict[str, str]) -> None:
    """Write the outcomes of the common tests on our own methods into their part of the page.

    Raises:
        ValueError: One of the methods was not tested.
    """
    untested = [name for name in NAMES if name not in map(method_of, own.outcomes)]
    if untested:
        raise ValueError(f"no test ran over {untested[0]}; run all test modules first")
    _replace_part(path, "own", _own_markdown(own, versions))


def _replace_part(path: Path, part: str, text: str) -> None:
    """Replace one part of the page by ``text`` and keep the other part; the file is replaced in one step."""
    marks = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in ("fused", "own")}
    page = path.read_text() if path.exists() else ""
    texts = {}
    for name, (begin, end) in marks.items():
        found = page.partition(begin)[2].partition(end)
        texts[name] = found[0].strip("\n") if found[1] else ""
    texts[part] = text.strip("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    parts = [f"{marks[name][0]}\n{texts[name]}\n{marks[name][1]}" for name in marks if texts[name]]
    unfinished.write_text("\n\n".join(parts) + "\n")
    unfinished.replace(path)


def _markdown(comparison: Comparison, versions: dict[str, str]) -> str:
    stock, fused = comparison.stock.outcomes, comparison.fused.outcomes
    columns = ("passed", "failed", "error", "skipped")
    rows = [
        f"| {mode} | " + " | ".join(str(Counter(outcomes.values())[c]) for c in columns) + " |"
        for mode, outcomes in (("stock", stock), ("fused", fused))
    ]
    differences = [f"- `{test}`: {KNOWN[test]}" for test in comparison.explained]
    differences += [f"- `{test}`: {_ROUNDING}" for test in comparison.rounding]
    differences += [f"- `{test}`: not explained" for test in comparison.regressions]
    gained = [f"- `{test}`" for test in comparison.gained]
    return "\n".join(
        [
            "# PEFT's own tests on fused layers",
            "",
            "Written by `make conformance` (see tests/conformance/README.md). It runs the LoRA tests of PEFT's own suite twice: with PEFT's layers,",
            "and with every layer fused that peftkit can fuse.",
            "",
            "With " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ":",
            "",
            "| layers | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
            *rows,
            "",
            f"Layers fused during the fused run: {comparison.fused.fused_layers:,}.",
            "",
            "## Passing with stock layers, not with fused layers",
            "",
            *(differences or ["None."]),
            "",
            "## Passing with fused layers only",
            "",
            *(gained or ["None."]),
            "",
            "## Failing with stock layers too",
            "",
            "These failures are independent of fused layers. Most of these tests need files of the Hugging Face hub that the offline stand-in lacks.",
            "",
            *_by_module(stock),
            "",
        ]
    )


def _own_markdown(own: Results, versions: dict[str, str]) -> str:
    columns = ("passed", "failed", "error", "skipped")
    rows = []
    for name in NAMES:
        counts = Counter(out for test, out in own.outcomes.items() if method_of(test) == name)
        rows.append(f"| `{name}` | " + " | ".join(str(counts[c]) for c in columns) + " |")
    failing = [f"- `{t}`" for t, out in own.outcomes.items() if out in ("failed", "error")]
    reasons = Counter(own.skipped.values())
    return "\n".join(
        [
            "# PEFT's common tests on peftkit's own methods",
            "",
            "Written by `make conformance ARGS=--own`. PEFT has tests that it runs on each of its methods. Here they run on prefixes, bottlenecks and",
            "their mix with LoRA instead, on every model of PEFT's lists for decoders, encoder-decoders, feature extraction and sequence",
            "classification.",
            "",
            "With " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ":",
            "",
            "| method | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
            *rows,
            "",
            "## Skipped, and why",
            "",
            *(f"- {count}: {reason}" for reason, count in reasons.most_common()),
            "",
            "## Failing",
            "",
            *(failing or ["None."]),
        ]
    )


def _by_module(outcomes: dict[str, str]) -> list[str]:
    failing = Counter(
        test.partition("::")[0]
        for test, outcome in outcomes.items()
        if outcome in {"failed", "error"}
    )
    return [f"- `{module}`: {count}" for module, count in sorted(failing.items())] or ["None."]


def _counts(outcomes: dict[str, str]) -> str:
    return ", ".join(
        f"{count} {name}" for name, count in sorted(Counter(outcomes.values()).items())
    )
