"""Extractive question answering: places of answers in windows, the best answer over windows, its scores, and faulty rows."""

import copy
import json

import finetune_cases as cases
import numpy as np
import pairs
import pytest
import task_models
import torch

from peftkit import ContractError, accelerate
from peftkit.finetune import evaluate, train
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.question_answering import (
    QuestionAnswering,
    best_score,
    exact_match,
    word_f1,
)


def task(seq_len=16, **options):
    settings = QuestionAnswering.Options(**{"stride": 4, **options})
    return QuestionAnswering(Setting(cases.letter_tokenizer(), seq_len, settings))


def row(context, answer, start=None):
    start = context.index(answer) if start is None else start
    return {"question": "who", "context": context, "answer": answer, "answer_start": start}


def test_every_form_of_the_answers_gives_the_same_row():
    flat = task().encode(row("ab cd ef", "cd"))
    for answers in (
        {"text": ["cd"], "answer_start": [3]},
        {"text": "cd", "answer_start": 3},
        [{"text": "cd", "answer_start": 3}],
        json.dumps({"text": ["cd"], "answer_start": [3]}),
    ):
        assert task().encode({"question": "who", "context": "ab cd ef", "answers": answers}) == flat
    # three tokens of the question before the context
    assert (flat[0].features["start_positions"], flat[0].features["end_positions"]) == (6, 7)
    assert task().render(flat[0].features).endswith("-> «cd»")


def test_windows_cover_the_context_and_hold_the_answer():
    context = "abcdefghijklmnopqrstuvwxyz"
    for start in range(23):
        answer = context[start : start + 4]
        windows = [one.features for one in task().encode(row(context, answer))]
        assert [w["window"] for w in windows] == list(range(len(windows)))
        covered = {place for w in windows for place in w["starts"] if place >= 0}
        assert covered == set(range(26))
        found = [
            w["context"][w["starts"][w["start_positions"]] : w["ends"][w["end_positions"]]]
            for w in windows
            if w["start_positions"] != w["no_answer"]
        ]
        assert found
        assert set(found) == {answer}
        assert all(len(w["input_ids"]) <= 16 for w in windows)


def test_the_best_answer_is_taken_over_all_windows():
    windows = [one.features for one in task().encode(row("abcdefghijklmnop", "nop"))]
    other = [one.features for one in task().encode(row("xyz", "y"))]
    rows = [*windows, *other]
    assert len(windows) == 2
    starts, ends = np.zeros((3, 16)), np.zeros((3, 16))
    starts[1, 3], ends[1, 5] = 2, 2
    # Tokens of the question and spans that end before they start are no answers.
    starts[0, 1] = ends[0, 2] = starts[0, 9] = ends[0, 4] = 1.5
    starts[2, 4], ends[2, 4] = 1, 1
    first = windows[1]["starts"][3]
    expected = ["abcdefghijklmnop"[first : first + 3], "y"]
    assert task().answers_of(rows, starts, ends) == expected
    # The position for no answer must be better in each window.
    starts[:, 0] = [9, 1, 9]
    assert task().answers_of(rows, starts, ends) == expected
    assert task(unanswerable=True).answers_of(rows, starts, ends) == [expected[0], ""]
    starts[2, 4] = 9
    assert task(max_answer_tokens=2).answers_of(rows[2:], starts[2:], ends[2:]) == ["y"]
    ends[2, 4], ends[2, 5] = 0, 9
    assert task(max_answer_tokens=1).answers_of(rows[2:], starts[2:], ends[2:]) != ["yz"]
    assert task(max_answer_tokens=2).answers_of(rows[2:], starts[2:], ends[2:]) == ["yz"]


def test_scores_are_those_of_squad():
    assert exact_match("The Cat!", "cat") == 1
    assert exact_match("the cats", "cat") == 0
    assert word_f1("the black cat", "black dog") == 0.5
    assert word_f1("", "") == word_f1("the", "") == 1
    assert word_f1("cat", "") == 0
    assert best_score(word_f1, "cat", ["dog", "a cat"]) == 1
    assert best_score(exact_match, "", []) == 1


FAULTS = {
    "another place": (
        row("ab cd ef", "cd", 2),
        "the answer 'cd' is not at answer_start=2 of the context, where ' c' is; it is at 3",
    ),
    "nowhere": (row("ab", "x", 0), "where 'a' is; it is nowhere"),
    "no start": ({**row("ab", "a"), "answer_start": None}, "answer_start is None, not the number"),
    "no answer": (
        {"question": "a", "context": "b"},
        "the row has no answer; set task.unanswerable",
    ),
    "no text": (
        {"question": "a", "context": "b", "answers": {"text": ["b"]}},
        "it must have text and answer_start",
    ),
    "fewer starts": (
        {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": []}},
        "1 answers, but answer_start is []",
    ),
    "no context": ({"question": "a", "answer": "b"}, "no column 'context'"),
    "a question that is too long": (
        {**row("abc", "a"), "question": "x" * 30},
        "the question and the special tokens have 30 tokens, which leaves 2 of training.seq_len=32",
    ),
    "an answer that is too long": (
        row("a" * 90, "a" * 40),
        "no window of training.seq_len=32 tokens holds the whole answer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_with_its_line(fault, tmp_path, one_thread):
    bad, expected = FAULTS[fault]
    model = cases.save_model(tmp_path / "m", "bert")
    data = cases.write_jsonl(tmp_path / "d.jsonl", [row("ab", "b"), bad])
    values = cases.recipe(
        model,
        {"name": "question_answering", "stride": 8},
        data,
        tmp_path / "run",
        training={"seq_len": 32},
    )
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values), code=1)
    assert "d.jsonl:2: " in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


def answers(count=32):
    """The answer is the capital letter; every fourth row has none."""
    rows = []
    for i in range(count):
        before, letter = "xyz"[: i % 3], "ABCD"[i % 4]
        context = before + (letter if i % 4 else "w") + "xyzxyzxyz" * (i % 2)
        rows.append(row(context, letter) if i % 4 else {"question": "who", "context": context})
    return rows


def test_a_run_with_windows_and_unanswerable_rows_learns_and_resumes(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    data = cases.write_jsonl(tmp_path / "d.jsonl", answers())
    values = cases.recipe(
        model,
        {"name": "question_answering", "stride": 2, "unanswerable": True},
        data,
        tmp_path / "whole",
        data={"eval": 0.25},
        training={
            "max_steps": 120,
            "lr": 5e-3,
            "batch_size": 16,
            "checkpoint_every": 60,
            "seq_len": 12,
            "head_lr": 1e-2,
        },
    )
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    cases.run("train", file, out, "training.stop_after=61", code=3)
    cases.run("train", file, out, "resume=true")
    whole, parts = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["metrics"] == parts["metrics"]
    weights = [next((tmp_path / f).glob("adapter/*.safetensors")) for f in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert whole["metrics"]["eval_exact_match"] >= 0.9
    facts = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert facts["train"]["samples"] > facts["train"]["used"]
    # Rows of a file, of which some have several windows, as the share that was set aside.
    assert evaluate(tmp_path / "whole", data)["exact_match"] >= 0.9


def without_dropout(model):
    """The same model in training mode, without anything random."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("name", ["bert answers", "llama answers", "t5 answers"])
def test_loss_and_gradients_are_those_of_plain_peft(name, one_thread):
    plain = pairs.adapted(without_dropout(task_models.task_model(name)))
    fused = accelerate(copy.deepcopy(plain))
    truth = pairs.in_float64(plain)
    one = task(seq_len=24)
    rows = [e.features for r in answers() if "answer" in r for e in one.encode(r)]
    runs = []
    for start in range(0, 16, 4):
        batch = one.collate(rows[start : start + 4])
        batch.pop("token_type_ids", None)
        runs.append(tuple(pairs.step(model, batch) for model in (fused, plain, truth)))
    pairs.assert_near_enough(runs)


def test_a_checkpoint_whose_backbone_would_stay_random_is_refused(tmp_path, one_thread):
    # transformers calls the backbone of LlamaForQuestionAnswering transformer, and in checkpoints it is model.
    model = cases.save_model(tmp_path / "m", "llama")
    rows = [one for one in answers(8) if "answer" in one]
    one = {"name": "question_answering", "stride": 2}
    with pytest.raises(ContractError, match="has no tensors for these weights of LlamaForQuest"):
        train(cases.recipe(model, one, rows, tmp_path / "run", training={"seq_len": 60}))
