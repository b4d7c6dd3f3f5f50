"""The generated requests: the same for a seed, determined by their text, and held-out ones new in every part."""

import hashlib
import json
import re

import pytest

from demo import vocabulary
from demo.generator import make_examples
from demo.intents import INTENTS
from demo.vocabulary import Pool


@pytest.fixture(scope="module")
def train():
    """The training pairs of the demo."""
    return make_examples("train", 3000, 0)


@pytest.fixture(scope="module")
def held_out():
    """The held-out pairs of the demo."""
    return make_examples("held_out", 300, 0)


def test_seed_determines_the_pairs_on_every_machine(held_out):
    assert make_examples("held_out", 300, 0) == held_out
    assert make_examples("held_out", 300, 1) != held_out
    text = "\n".join(example.request + example.answer for example in held_out)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7189771543312e71"


def test_held_out_templates_and_values_never_occur_in_training(train, held_out):
    assert not {e.template for e in train} & {e.template for e in held_out}
    seen = {atom for e in train for atom in e.atoms}
    new = {atom for e in held_out for atom in e.atoms}
    assert not seen & new
    assert {kind for kind, _ in new} == {kind for kind, _ in seen}


def test_held_out_words_stand_in_no_training_request(train, held_out):
    """By text, not by bookkeeping: no name, place, thing or day of a held-out request is in any training request."""
    text = "\n".join(example.request.lower() for example in train)
    rules = {"number", "date", "year", "time"}  # split by rule; digits of 3 are also in 13
    for kind, value in {atom for e in held_out for atom in e.atoms}:
        if kind not in rules:
            assert not re.search(rf"\b{re.escape(value.lower())}\b", text), (kind, value)


def test_pools_and_templates_are_disjoint_as_written():
    pools = [pool for pool in vars(vocabulary).values() if isinstance(pool, Pool)]
    train = {value.lower() for pool in pools for value in pool.train}
    assert len(pools) > 15
    for pool in pools:
        assert not train & {value.lower() for value in pool.held_out}
        assert len(set(pool.train)) == len(pool.train)
    for intent in INTENTS:
        assert not set(intent.train) & set(intent.held_out)


def test_request_determines_its_record(train, held_out):
    records = {}
    for example in train + held_out:
        assert records.setdefault(example.request, example.answer) == example.answer
    assert len(records) == 3300


def test_answers_are_compact_json_with_nested_fields(train):
    assert len({example.intent for example in train}) >= 8
    for example in train:
        assert json.loads(example.answer) == example.record
        assert ": " not in example.answer.replace(": ", "", example.request.count(": "))
        assert "{" not in example.request
    nested = [e for e in train if any(isinstance(v, (dict, list)) for v in e.record.values())]
    assert len(nested) > 2000


@pytest.mark.parametrize(
    ("request_", "field", "value"),
    [
        (r"on (?:the )?3(?:rd)?(?: of)? March|on March 3\b", "date", r"(20\d\d-)?03-03"),
        (r"at 16:30", "time", "16:30"),
        (r"at 4:30 pm", "time", "4:30 pm"),
        (r"in two days", "in_days", 2),
    ],
    ids=["date", "24_hours", "12_hours", "words"],
)
def test_dates_and_numbers_are_normalised_and_times_kept(request_, field, value):
    found = 0
    for example in make_examples("train", 20000, 5):
        if re.search(request_, example.request):
            where = example.record.get("when") or example.record.get("send")
            found += 1
            assert re.fullmatch(str(value), str(where[field]))
    assert found


def test_no_answer_and_no_request_is_cut_off_or_empty(train):
    assert max(len(example.request) for example in train) < 160
    assert all(
        example.request[0].isupper() or not example.request[0].isalpha() for example in train
    )


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='test'"):
        make_examples("test", 1, 0)
