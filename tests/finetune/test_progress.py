"""What is shown while a training runs."""

import io
import json

import finetune_cases as cases
import pytest
from rich.console import Console
from safetensors.torch import load_file

from peftkit.cli.progress import TrainingDisplay, facts_of
from peftkit.finetune import train
from peftkit.finetune.progress import Progress

PROGRESS = Progress(
    step=3,
    steps=8,
    loss=1.25,
    learning_rate=2e-4,
    rows_per_second=4.0,
    tokens_per_second=1234.5,
    memory_bytes=2**20,
    planned_bytes=2**21,
    seconds_left=3725.4,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def run(model, tmp_path, **changes):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(12))
    training = {"max_steps": 4, "batch_size": 2, "gradient_accumulation": 2, "log_every": 1}
    values = cases.recipe(model, "sft", data, tmp_path / "run", training=training, **changes)
    seen: list[Progress] = []
    result = train(values, watch=seen.append)
    return result, seen


def test_each_step_is_reported(model, tmp_path, one_thread):
    result, seen = run(model, tmp_path)
    assert [(p.step, p.steps) for p in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    assert seen[-1].seconds_left == 0 < seen[0].seconds_left
    for progress in seen:
        # four rows of equal length but for their padding, at the speed of the rows
        tokens = progress.tokens_per_second / progress.rows_per_second
        assert 5 <= tokens <= 20
        assert progress.planned_bytes > 0
        assert progress.memory_bytes >= 0
    # The loss of a step is logged after it.
    assert seen[0].loss is None
    assert all(progress.loss > 0 for progress in seen[1:])
    assert seen[0].learning_rate > seen[-1].learning_rate
    assert result.status == "finished"


def test_an_answer_is_said_at_each_checkpoint_and_changes_nothing(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(12))
    found = {}
    for samples in (0, 2):
        training = {"max_steps": 6, "batch_size": 2, "checkpoint_every": 2, "sample_tokens": 4}
        values = cases.recipe(
            *(model, "sft", data, tmp_path / str(samples)),
            strategy={"name": "lora", "r": 4, "lora_dropout": 0.1},
            training=training | {"samples": samples},
        )
        lines: list[str] = []
        train(values, say=lines.append)
        found[samples] = [line for line in lines if " -> " in line]
    assert found[0] == []
    assert [line.partition(":")[0] for line in found[2]] == ["step 2", "step 4"]
    question = json.loads((tmp_path / "2" / "samples.json").read_text())[0]["prompt"]
    assert question.split()[-1] in found[2][0]
    files = (next((tmp_path / str(n) / "adapter").glob("*.safetensors")) for n in (0, 2))
    one, other = map(load_file, files)
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_stages_are_reported_one_after_the_other(model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    stage = {"task": "sft", "data": {"train": str(data)}}
    length = {"batch_size": 2, "samples": 0}
    values = {
        "model": str(model),
        "strategy": {"name": "lora", "r": 2},
        "stages": [stage | {"training": length | {"max_steps": n}} for n in (1, 2)],
        "out": str(tmp_path / "run"),
    }
    seen: list[Progress] = []
    train(values, watch=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(1, 1), (1, 2), (2, 2)]


def test_the_facts_are_in_one_line():
    text = (
        "loss 1.25  lr 2.00e-04  1,234 tokens/s  memory +1.00 MiB of 2.00 MiB planned  1:02:05 left"
    )
    assert facts_of(PROGRESS) == text
    short = Progress(1, 2, None, None, 4.0, None, 0, None, 59.6)
    assert facts_of(short) == "4 rows/s  memory +0 B  1:00 left"


def test_lines_stay_above_the_progress():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    with TrainingDisplay(console) as display:
        display.say("train: [4] rows")
        display.show(PROGRESS)
        display._bars.refresh()
        display.say("a line")
    printed = out.getvalue()
    assert "train: [4] rows" in printed
    assert "step 3/8" in printed
    assert "1,234 tokens/s" in printed
    assert printed.index("step 3/8") < printed.index("a line")
