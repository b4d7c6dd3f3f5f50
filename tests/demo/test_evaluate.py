"""Decoding in batches, and the score."""

import pytest
import torch

from demo.evaluate import decode, decode_tokens, longest_answer, parse, same_json, score
from demo.generator import make_examples
from demo.model import load_model, load_tokenizer


@pytest.fixture(scope="module")
def examples():
    """A few held-out pairs."""
    return make_examples("held_out", 22, 0)


def test_right_predictions_score_one_in_any_key_order_and_number_form(examples):
    predictions = [example.answer for example in examples]
    predictions[0] = " " + predictions[0].replace(",", " ,\n")
    result = score(examples, predictions)
    assert (result.exact_match, result.valid_json, result.fields) == (1.0, 1.0, 1.0)
    assert set(result.by_intent.values()) == {1.0}


def test_score_counts_what_is_wrong(examples):
    predictions = [example.answer for example in examples]
    predictions[0] = predictions[0][:-1]  # not JSON
    predictions[1] = predictions[1] + "}"  # JSON and something else
    predictions[2] = predictions[2].replace('"intent":"', '"intent":"no')
    result = score(examples, predictions)
    assert result.exact_match == pytest.approx(19 / 22)
    assert result.valid_json == pytest.approx(20 / 22)
    assert 19 / 22 < result.fields < 1.0
    assert result.by_intent[examples[2].intent] < 1.0


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1.0}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([1, 2], [2, 1], False),
        ({"a": {}}, {"a": []}, False),
        (None, {}, False),
    ],
)
def test_json_equality(left, right, same):
    assert same_json(left, right) is same
    assert same_json(right, left) is same


def test_parse_takes_objects_only():
    assert parse('{"a":1}') == {"a": 1}
    assert [parse(text) for text in ("[1]", "3", "", '{"a":1} {"b":2}', "{")] == [None] * 5


def test_score_needs_one_prediction_per_example(examples):
    with pytest.raises(ValueError, match="got 1 for 22"):
        score(examples, ["{}"])


def test_decoding_equals_generate_row_by_row(tiny_base, examples):
    """Prompts of unequal length, rows leaving when they end: the same tokens as transformers' own generate, alone."""
    model, tokenizer = load_model(tiny_base).double(), load_tokenizer(tiny_base)
    with torch.no_grad():  # far from its initial weights, or it would repeat one token
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    requests = [example.request[: 5 + 3 * i] for i, example in enumerate(examples)]
    alone = []
    for request in requests:
        prompt = tokenizer(f"> {request}\nJSON:", return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        alone.append(out[0, prompt["input_ids"].shape[1] :].tolist())
    # The end of sequence is a token that ends the rows at many different lengths.
    end = max(
        {token for row in alone for token in row},
        key=lambda token: len({row.index(token) for row in alone if token in row}),
    )
    tokenizer.eos_token_id = end
    expected = [row[: row.index(end)] if end in row else row for row in alone]
    assert len({len(row) for row in expected}) > 3

    seen = []
    answers = decode_tokens(
        model,
        tokenizer,
        requests,
        max_new_tokens=12,
        batch_size=7,
        on_progress=lambda *done: seen.append(done),
    )
    assert answers == expected
    assert seen == sorted(seen)
    assert seen[-1] == (12 * len(requests), len(requests))
    assert len({tokens for tokens, _ in seen}) > 20  # moves although few requests are finished
    texts = decode(model, tokenizer, requests, max_new_tokens=12)
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_longest_answer_bounds_every_answer(tiny_base, examples):
    tokenizer = load_tokenizer(tiny_base)
    lengths = [len(tokenizer(e.answer)["input_ids"]) + 1 for e in examples]
    assert longest_answer(examples, tokenizer) == max(lengths)
