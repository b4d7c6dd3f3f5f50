"""A run that is killed at any moment and resumed ends with the same weights, bit for bit, and never loses a complete checkpoint."""

import json
import random
import signal

import finetune_cases as cases
import pytest
from finetune_kills import PLACES, Runs
from safetensors.torch import load_file

from peftkit.finetune.checkpoints import checkpoints_in, is_whole

STRATEGIES = {"lora": {"name": "lora", "r": 4, "lora_dropout": 0.2}, "full": {"name": "full"}}
CHECKPOINT_EVERY = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


def write_recipe(model, tmp_path, strategy, steps):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(20))
    settings = {"max_steps": steps, "checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 1}
    return cases.write_recipe(
        tmp_path / "r.yaml",
        cases.recipe(
            model,
            "sft",
            data,
            tmp_path / "whole",
            strategy=STRATEGIES[strategy],
            data={"eval": 0.2},
            training={**settings, "samples": 1, "sample_tokens": 4, "batch_size": 2, "lr": 1e-3},
        ),
    )


def finish(runs, file, out, **moment):
    assert runs.train(file, out=out, **moment) == 0, runs.log.read_text()


def newest(out):
    """The step of the newest complete checkpoint, or 0."""
    found = [int(c.name.split("-")[1]) for c in checkpoints_in(out / "checkpoints") if is_whole(c)]
    return max(found, default=0)


def kill_and_resume(runs, file, out, moments):
    """Run, die at each moment, and finish; returns how often the run died."""
    kills, step = 0, 0
    for moment in moments:
        status = runs.train(file, out=out, **moment)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, runs.log.read_text()
        kills += 1
        assert newest(out) >= step
        step = newest(out)
    finish(runs, file, out)
    return kills


def assert_equal(whole, other):
    (first,), (second,) = (list(f.glob("*/*model.safetensors")) for f in (whole, other))
    tensors, others = load_file(first), load_file(second)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not tensors[name].equal(others[name])] == []
    assert losses(whole) == losses(other)
    # A checkpoint that was cut off is removed later.
    assert all(is_whole(c, read=True) for c in checkpoints_in(other / "checkpoints"))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_two_kills(runs, model, tmp_path):
    file = write_recipe(model, tmp_path, "lora", steps=6)
    finish(runs, file, tmp_path / "whole")
    moments = [{"place": "optimizer"}, {"place": "removal"}]
    assert kill_and_resume(runs, file, tmp_path / "parts", moments) == 2
    assert_equal(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kills_at_many_moments(strategy, runs, model, tmp_path):
    file = write_recipe(model, tmp_path, strategy, steps=20)
    whole = tmp_path / "whole"
    finish(runs, file, whole)
    seconds, events = runs.seconds, runs.events
    draw = random.Random(strategy)
    chains = [
        [{"place": place} for place in PLACES],
        [{"event": draw.randint(1, events // 5)} for _ in range(6)],
        *([{"event": draw.randint(1, events)}] for _ in range(2)),
        # The weights, the report and the result are written.
        *([{"event": events - number}] for number in (0, 3, 8)),
        *([{"seconds": draw.uniform(0.1, 1) * seconds} for _ in range(4)] for _ in range(3)),
    ]
    kills = 0
    for number, moments in enumerate(chains):
        kills += kill_and_resume(runs, file, tmp_path / f"parts-{number}", moments)
        assert_equal(whole, tmp_path / f"parts-{number}")
    assert kills >= 20
