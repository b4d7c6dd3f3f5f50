"""The comparison of two runs of PEFT's tests: what counts as a regression, and what is refused."""

from pathlib import Path

import pytest


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import report

    return report


def results(report, fused_layers=0, **outcomes):
    return report.Results(outcomes, fused_layers)


def test_regression_is_a_pass_that_is_lost(report):
    stock = results(report, a="passed", b="passed", c="failed", d="passed", e="skipped")
    fused = results(report, 7, a="passed", b="failed", c="passed", e="skipped")
    comparison = report.compare(stock, fused)
    assert comparison.regressions == ["b", "d"]  # d did not run at all
    assert comparison.gained == ["c"]
    assert "b: failed" in comparison.summary()
    assert "d: None" in comparison.summary()


def test_known_difference_is_explained_and_no_regression(report, monkeypatch):
    monkeypatch.setitem(report.KNOWN, "b", "compares a class path")
    comparison = report.compare(results(report, b="passed"), results(report, 1, b="failed"))
    assert (comparison.regressions, comparison.explained) == ([], ["b"])
    assert "compares a class path" in comparison.summary()


def test_lost_test_that_passes_with_torchs_product_is_rounding(report):
    stock = results(report, a="passed", b="passed")
    fused = results(report, 1, a="failed", b="failed")
    comparison = report.compare(stock, fused, results(report, 1, a="passed", b="failed"))
    assert (comparison.rounding, comparison.regressions) == (["a"], ["b"])


def test_empty_runs_are_refused(report):
    with pytest.raises(ValueError, match="run both modes first"):
        report.compare(results(report), results(report, 1, a="passed"))
    with pytest.raises(ValueError, match="fused no layer"):
        report.compare(results(report, a="passed"), results(report, 0, a="passed"))


def test_page_states_counts_versions_and_differences(report, tmp_path):
    stock = results(report, a="passed", **{"tests/x.py::c": "error"})
    comparison = report.compare(stock, results(report, 1234, a="failed"))
    page = tmp_path / "docs" / "page.md"
    report.write(page, comparison, {"peft": "0.21.2"})
    text = page.read_text()
    assert "With peft 0.21.2:" in text
    assert "| stock | 1 | 0 | 1 | 0 |" in text
    assert "| fused | 0 | 1 | 0 | 0 |" in text
    assert "1,234" in text
    assert "- `a`: not explained" in text
    assert "- `tests/x.py`: 1" in text
    assert list(page.parent.iterdir()) == [page]


def test_own_methods_have_a_part_of_the_page(report, tmp_path):
    page, versions = tmp_path / "page.md", {"peft": "0.21.2"}
    ids = [f"tests/x.py::t[{name}-config_kwargs0-model]" for name in report.NAMES]
    own = results(report)
    own.outcomes.update(zip(ids, ("passed", "skipped", "failed"), strict=True))
    own.skipped[ids[1]] = "no weight equals it"
    report.write_own(page, own, versions)
    fused = report.compare(results(report, a="passed"), results(report, 1, a="passed"))
    report.write(page, fused, versions)
    report.write_own(page, own, versions)
    text = page.read_text()
    assert text.count("# PEFT's own tests on fused layers") == 1
    assert text.count("# PEFT's common tests on peftkit's own methods") == 1
    assert "| `BottleneckConfig` | 1 | 0 | 0 | 0 |" in text
    assert "| `PrefixConfig` | 0 | 0 | 0 | 1 |" in text
    assert "- 1: no weight equals it" in text
    assert f"- `{ids[2]}`" in text
    del own.outcomes[ids[0]]
    with pytest.raises(ValueError, match="no test ran over BottleneckConfig"):
        report.write_own(page, own, versions)
