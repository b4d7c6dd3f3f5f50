"""The estimate of the time, and shorter runs on slow machines."""

import pytest

from demo.calibrate import STEPS, Pace, Work, calibrate, estimate, fitted, work
from demo.dataset import prompt_of
from demo.generator import make_examples
from demo.model import load_model, load_tokenizer
from demo.settings import Settings
from demo.train import training_rows

PACE = Pace(train_token=0.01, prompt_token=0.001, decode_token=0.002)
WORK = Work(train=150_000, prompts=6_000, answers=9_000, longest=60, requests=300)


def test_the_estimate_is_time_by_token():
    found = estimate(PACE, WORK, Settings(), compare=True)
    assert found["training"] == pytest.approx(1500)
    assert found["base"] == pytest.approx(6 + 0.002 * 300 * 60)
    assert found["tuned"] == pytest.approx(1.2 * (6 + 0.002 * 9000))
    assert found["comparison"] > 8 * 3 * 1500 / 300
    assert "comparison" not in estimate(PACE, WORK, Settings(), compare=False)


@pytest.mark.parametrize(
    ("minutes", "steps", "held_out"),
    [(60, 300, 300), (30, 300, 100), (26, 250, 100), (1, 150, 100)],
)
def test_a_slow_machine_gets_the_longest_run_that_fits(minutes, steps, held_out):
    chosen, seconds = fitted(PACE, WORK, Settings(), True, minutes)
    assert (chosen.steps, chosen.held_out_pairs) == (steps, held_out)
    assert sum(seconds.values()) <= 60 * minutes or chosen.steps == 150
    assert seconds["training"] == pytest.approx(1500 * steps / 300)


def test_a_small_run_is_never_made_longer():
    tiny = Settings(steps=6, held_out_pairs=11, compare_steps=2)
    assert fitted(PACE, WORK, tiny, True, 0)[0] == tiny


def test_timing_leaves_the_model_as_it_is(tiny_base):
    model, tokenizer = load_model(tiny_base), load_tokenizer(tiny_base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = Settings(train_pairs=40, steps=3, batch_size=4, lora_r=4)
    examples = make_examples("held_out", 11, 0)
    rows = training_rows(make_examples("train", 40, 0), tokenizer, settings)
    requests, parts = [e.request for e in examples], []
    pace = calibrate(model, tokenizer, requests, rows, settings, parts.append)
    assert parts == list(range(1, STEPS + 1))
    assert min(pace.train_token, pace.decode_token) > 0
    assert not hasattr(model, "peft_config")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)
    todo = work(tokenizer, requests, [e.answer for e in examples], rows)
    assert todo.train == sum(len(row["input_ids"]) for row in rows)
    assert todo.prompts == sum(len(prompt_of(request)) for request in requests)  # bytes are tokens
    assert todo.longest == 1 + max(len(e.answer) for e in examples)
