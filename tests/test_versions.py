"""A library newer than any tested one is named in one warning."""

import warnings

import pytest

from peftkit import versions


def install(monkeypatch, **numbers):
    monkeypatch.setattr(versions, "version", lambda name: numbers[name])


@pytest.mark.parametrize("number", ["5.10.0", "5.23.0", "5.23.7"])
def test_tested_versions_are_silent(monkeypatch, number):
    install(monkeypatch, transformers=number, peft="0.21.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_newer_than_tested()


@pytest.mark.parametrize("number", ["5.24.0", "5.24.0rc1", "6.0"])
def test_newer_version_is_named(monkeypatch, number):
    install(monkeypatch, transformers=number, peft="0.21.2")
    expected = rf"transformers {number} \(tested up to 5\.23\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        versions.warn_if_newer_than_tested()
    assert len(caught) == 1
    assert "peft 0" not in str(caught[0].message)


def test_two_newer_versions_give_one_warning(monkeypatch):
    install(monkeypatch, transformers="5.30.1", peft="0.22.0")
    with pytest.warns(UserWarning, match=r"transformers 5\.30\.1 .* and peft 0\.22\.0") as caught:
        versions.warn_if_newer_than_tested()
    assert len(caught) == 1


def test_repeats_are_silent_under_the_default_filters(monkeypatch):
    install(monkeypatch, transformers="6.0", peft="0.21.2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            versions.warn_if_newer_than_tested()
    assert len(caught) == 1
