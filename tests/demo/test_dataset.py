"""Tokenising, batching and the labels: loss on the answer and its end, nowhere else."""

import pytest
import torch

from demo.dataset import IGNORED, collate, encode, order_in_batches, prompt_of
from demo.generator import make_examples
from demo.model import load_tokenizer
from demo.settings import Settings
from demo.train import training_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    """Reads bytes."""
    return load_tokenizer(tiny_base)


def test_labels_cover_the_answer_and_the_end_alone(tokenizer):
    example = make_examples("train", 1, 0)[0]
    row = encode(example, tokenizer)
    prompt = [
        i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED
    ]
    answer = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(prompt) == prompt_of(example.request)
    assert tokenizer.decode(answer[:-1]) == example.answer
    assert answer[-1] == tokenizer.eos_token_id
    assert row["input_ids"] == prompt + answer


def test_collate_pads_on_the_right_to_a_multiple_of_4_without_loss():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED], [8, *[IGNORED] * 3]]
    assert set(batch) == {"input_ids", "labels"}


def test_batches_are_of_similar_length_and_hold_each_example_at_most_once():
    lengths = torch.randint(20, 100, (403,), generator=torch.Generator().manual_seed(1)).tolist()
    order = order_in_batches(lengths, 8, seed=3)
    assert len(order) == 400
    assert len(set(order)) == 400
    padded = sum(8 * max(lengths[i] for i in order[k : k + 8]) for k in range(0, 400, 8))
    assert sum(lengths[i] for i in order) / padded > 0.9
    assert order == order_in_batches(lengths, 8, seed=3) != order_in_batches(lengths, 8, seed=4)


def test_rows_of_a_run_go_round_in_a_new_order(tokenizer):
    examples = make_examples("train", 32, 0)
    settings = Settings(steps=12, batch_size=4)
    rows = [tuple(row["input_ids"]) for row in training_rows(examples, tokenizer, settings)]
    assert len(rows) == 48
    assert set(rows[:32]) == {tuple(encode(e, tokenizer)["input_ids"]) for e in examples}
    assert rows[32:] != rows[:16]
