"""The comparison of two runs of PEFT's tests: what counts as a regression, and what is refused."""

from pathlib import Path

import pytest


@pytest.fixture
def outcomes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import outcomes

    return outcomes


def results(outcomes, fused_layers=0, **kinds):
    return outcomes.Results(kinds, fused_layers)


def test_a_lost_pass_is_a_regression(outcomes):
    stock = results(outcomes, a="passed", b="passed", c="failed", d="passed", e="skipped")
    fused = results(outcomes, 7, a="passed", b="failed", c="passed", e="skipped")
    comparison = outcomes.compare(stock, fused)
    assert comparison.regressions == ["b", "d"]  # d did not run at all
    assert comparison.gained == ["c"]
    assert "b: failed" in comparison.summary()
    assert "d: None" in comparison.summary()


def test_known_difference_is_explained_and_no_regression(outcomes, monkeypatch):
    monkeypatch.setitem(outcomes.KNOWN, "b", "compares a class path")
    comparison = outcomes.compare(results(outcomes, b="passed"), results(outcomes, 1, b="failed"))
    assert (comparison.regressions, comparison.explained) == ([], ["b"])
    assert "compares a class path" in comparison.summary()


def test_lost_test_that_passes_with_torchs_product_is_rounding(outcomes):
    stock = results(outcomes, a="passed", b="passed")
    fused = results(outcomes, 1, a="failed", b="failed")
    comparison = outcomes.compare(stock, fused, results(outcomes, 1, a="passed", b="failed"))
    assert (comparison.rounding, comparison.regressions) == (["a"], ["b"])


def test_empty_runs_are_refused(outcomes):
    with pytest.raises(ValueError, match="run both modes first"):
        outcomes.compare(results(outcomes), results(outcomes, 1, a="passed"))
    with pytest.raises(ValueError, match="fused no layer"):
        outcomes.compare(results(outcomes, a="passed"), results(outcomes, 0, a="passed"))


def test_page_states_counts_versions_and_differences(outcomes, tmp_path):
    stock = results(outcomes, a="passed", **{"tests/x.py::c": "error"})
    comparison = outcomes.compare(stock, results(outcomes, 1234, a="failed"))
    page = tmp_path / "docs" / "page.md"
    outcomes.write(page, comparison, {"peft": "0.21.2"})
    text = page.read_text()
    assert "With peft 0.21.2:" in text
    assert "| stock | 1 | 0 | 1 | 0 |" in text
    assert "| fused | 0 | 1 | 0 | 0 |" in text
    assert "1,234" in text
    assert "- `a`: not explained" in text
    assert "- `tests/x.py`: 1" in text
    assert list(page.parent.iterdir()) == [page]


def test_own_methods_have_their_own_part_of_the_page(outcomes, tmp_path):
    page, versions = tmp_path / "page.md", {"peft": "0.21.2"}
    ids = [f"tests/x.py::t[{name}-config_kwargs0-model]" for name in outcomes.NAMES]
    own = results(outcomes)
    own.outcomes.update(zip(ids, ("passed", "skipped", "failed"), strict=True))
    own.skipped[ids[1]] = "no weight equals it"
    outcomes.write_own(page, own, versions)
    fused = outcomes.compare(results(outcomes, a="passed"), results(outcomes, 1, a="passed"))
    outcomes.write(page, fused, versions)
    outcomes.write_own(page, own, versions)
    text = page.read_text()
    assert text.count("# PEFT's own tests on fused layers") == 1
    assert text.count("# PEFT's common tests on peftkit's own methods") == 1
    assert "| `BottleneckConfig` | 1 | 0 | 0 | 0 |" in text
    assert "| `PrefixConfig` | 0 | 0 | 0 | 1 |" in text
    assert "- 1: no weight equals it" in text
    assert f"- `{ids[2]}`" in text
    del own.outcomes[ids[0]]
    with pytest.raises(ValueError, match="no test ran over BottleneckConfig"):
        outcomes.write_own(page, own, versions)
