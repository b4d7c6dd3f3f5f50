"""Every task from a recipe to a finished run, with the command, on tiny models: it learns, and the run can be used."""

import json
import random
from pathlib import Path

import finetune_cases as cases
import pytest
import speech_cases
import torch

from peftkit import ContractError
from peftkit.finetune import evaluate, train
from peftkit.finetune.tasks import TASKS, require_task
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.embeddings import Embeddings
from peftkit.finetune.tasks.masked_lm import MaskedLm
from peftkit.finetune.tasks.scores import macro_f1, span_f1, spans


def topics(count=48):
    """The class is the letter that the text is made of."""
    draw = random.Random(0)
    return [
        {
            "text": draw.choice("abc") * 3 + " " + "xyz"[i % 3] * 5,
            "label": ["one", "two", "six"][i % 3],
        }
        for i in range(count)
    ]


TEXTS = [{"text": "abcabcabcabc"}, {"text": "xyzxyzxyz"}] * 12
COPIES = [{"source": c * 3, "target": c} for c in "abcd"] * 8
CHOICES = [{"prompt": c, "chosen": "ab", "rejected": "xyz"} for c in "abcdefgh"] * 6
SPANS = [
    {"question": "?", "context": "xy" * (i % 3) + c + "z", "answer": c, "answer_start": i % 3 * 2}
    for i, c in enumerate("ABCD" * 8)
]
CASES = {
    "audio_classification": (
        speech_cases.save_audio,
        "lora",
        lambda folder: str(speech_cases.sounds(folder / "s")),
        "accuracy",
        0.9,
    ),
    "speech_ctc": (
        speech_cases.save_ctc,
        "lora",
        lambda folder: speech_cases.speech(folder / "s"),
        "cer",
        None,  # test_speech_ctc.py has a run that is long enough to learn
    ),
    "question_answering": ("bert", "full", lambda folder: SPANS, "exact_match", 0.5),
    "preference": ("llama", "lora", lambda folder: CHOICES, "rewards/accuracies", 0.9),
    "masked_lm": ("masked bert", "full", lambda folder: TEXTS, "token_accuracy", 0.5),
    "text_classification": ("bert", "lora", lambda folder: topics(), "accuracy", 0.9),
    "token_classification": ("bert", "lora", lambda folder: cases.tagged(), "f1", 0.9),
    "seq2seq": ("t5", "lora", lambda folder: COPIES, "token_accuracy", 0.7),
    "image_classification": (
        "vit",
        "lora",
        lambda folder: str(cases.images(folder / "i")),
        "accuracy",
        0.9,
    ),
    "embeddings": ("bert", "lora", lambda folder: cases.pairs(), "recall_at_1", 0.5),
}


@pytest.mark.parametrize("task", CASES)
def test_a_task_learns_and_its_run_can_be_used(task, tmp_path, one_thread):
    name, strategy, rows, metric, least = CASES[task]
    model = name(tmp_path / "m") if callable(name) else cases.save_model(tmp_path / "m", name)
    found = rows(tmp_path)
    data = found if isinstance(found, str) else cases.write_jsonl(tmp_path / "d.jsonl", found)
    values = cases.recipe(
        model,
        task,
        data,
        tmp_path / "run",
        strategy=strategy,
        data={"eval": 0.25},
        training={
            "max_steps": 60,
            "batch_size": 16,
            "lr": 1e-2,
            "head_lr": 1e-2,
            "checkpoint_every": 20,
        },
    )
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "sample: " in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert least is None or result["metrics"][f"eval_{metric}"] >= least, printed
    again = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    assert again.keys() >= {"loss", *require_task(task).metric_names}
    assert again[metric] == result["metrics"][f"eval_{metric}"]
    assert again["loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-5)
    card = (
        tmp_path / "run" / ("model" if strategy == "full" else "adapter") / "README.md"
    ).read_text()
    assert "base_model: ../../m" in card
    assert metric in card
    code = card.partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(Path(result["weights"]))), found)
    assert isinstance(found["model"], torch.nn.Module)
    if not require_task(task).generative:
        assert "which writes no text" in cases.run("generate", tmp_path / "run", "x", code=1)
    else:
        assert cases.run("generate", tmp_path / "run", "aaa")


def test_every_task_is_tested():
    elsewhere = {
        "sft",
        "causal_lm",
        "span_corruption",
        "contrastive",
        "contrastive_images",
        "vision_chat",
        "image_text_retrieval",
        "semantic_segmentation",
        "object_detection",
        "speech_seq2seq",
        "text_to_speech",
    }
    assert {*CASES, *elsewhere} == set(TASKS)


FAULTS = {
    "one class": (
        "text_classification",
        [{"text": "a", "label": "x"}] * 4,
        "1 different labels (x)",
    ),
    "no label": (
        "text_classification",
        [*topics(3), {"text": "a"}],
        "d.jsonl:4: column 'label' is empty",
    ),
    "a label of another type": (
        "text_classification",
        [*topics(3), {"text": "a", "label": 1.5}],
        "d.jsonl:4: label 1.5 is of type float",
    ),
    "tags that are too few": (
        "token_classification",
        [*cases.tagged(2), {"tokens": ["a", "b"], "tags": ["O"]}],
        "d.jsonl:3: 2 tokens, but 1 tags",
    ),
    "a pair without a partner": (
        "embeddings",
        [*cases.pairs(3), {"anchor": "a"}],
        "d.jsonl:4: no column 'positive'",
    ),
    "no image": (
        "image_classification",
        [{"image": "/nowhere.png", "label": "a"}, {"image": "/no.png", "label": "b"}],
        "d.jsonl:1: the image /nowhere.png does not exist",
    ),
    "a batch of one": (
        "embeddings",
        cases.pairs(1),
        "compares the rows of a batch, but a batch has 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_of_tasks_are_named(fault, tmp_path, one_thread):
    task, rows, expected = FAULTS[fault]
    model = cases.save_model(tmp_path / "m", "vit" if task == "image_classification" else "bert")
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, task, data, tmp_path / "run")
    )
    assert expected in cases.run("train", file, code=1)
    assert not (tmp_path / "run").exists()


MISFITS = {
    "an encoder for sft": ("sft", "masked bert", "attends to the tokens that it should predict"),
    "an encoder-decoder for sft": ("sft", "t5", "AutoModelForCausalLM has no class for T5Config"),
    "a decoder for seq2seq": (
        "seq2seq",
        "llama",
        "AutoModelForSeq2SeqLM has no class for LlamaConfig",
    ),
    "an encoder-decoder for embeddings": ("embeddings", "t5", "needs an encoder or a decoder"),
    "a text model for images": ("image_classification", "bert", "has no image processor"),
    "an image model for texts": ("causal_lm", "vit", "has no tokenizer"),
}
ROWS = {"sft": cases.chats(8), "causal_lm": TEXTS, "seq2seq": COPIES, "embeddings": cases.pairs(8)}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_model_that_does_not_fit_the_task_is_refused(misfit, tmp_path, one_thread):
    task, name, expected = MISFITS[misfit]
    model = cases.save_model(tmp_path / "m", name, chat=True)
    data = str(cases.images(tmp_path / "i", 2)) if task == "image_classification" else ROWS[task]
    with pytest.raises(ContractError, match=expected):
        train(cases.recipe(model, task, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    tokenizer = cases.letter_tokenizer(chat=True)
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    tokenizer.save_pretrained(model)
    rows = cases.chats(8)
    # Tokens that no row has do not matter.
    train(cases.recipe(model, "sft", rows, tmp_path / "run"))
    rows[3]["messages"][1]["content"] = "<39>"
    with pytest.raises(
        ContractError, match=r"makes the token id \d+, but the model's embeddings have 96 rows"
    ):
        train(cases.recipe(model, "sft", rows, tmp_path / "run2"))


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_embeddings_of_a_checkpoint_without_a_pooler(strategy, tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "masked bert")
    found = train(
        cases.recipe(model, "embeddings", cases.pairs(8), tmp_path / "run", strategy=strategy)
    )
    assert found.problems == []
    assert any("pooler.dense.weight" in note for note in found.notes) is (strategy == "full")
    assert evaluate(tmp_path / "run", cases.pairs(8))["loss"] > 0


def test_new_labels_in_the_evaluation_are_named(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    values = cases.recipe(model, "text_classification", topics(6), tmp_path / "run")
    values["data"]["eval"] = [{"text": "a", "label": "seven"}]
    with pytest.raises(
        ValueError, match=r"data.eval row 1: label 'seven' is not one of one, six, two"
    ):
        train(values)


def test_numbers_are_labels_in_their_own_order(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    rows = [{"text": "abc", "label": i % 11} for i in range(22)]
    train(cases.recipe(model, "text_classification", rows, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "data.json").read_text())["labels"] == list(
        map(str, range(11))
    )
    with pytest.raises(ValueError, match="had no data"):
        evaluate(tmp_path / "run")
    assert evaluate(tmp_path / "run", rows)["accuracy"] >= 0.0


def test_masks_hide_some_tokens_and_never_padding():
    task = MaskedLm(Setting(cases.letter_tokenizer(), 64, MaskedLm.Options(mask_share=0.3)))
    rows = [task.encode({"text": "abcdefghij" * n})[0].features for n in (1, 5)]
    hidden = masked = 0
    for task.round in range(200):
        batch = task.collate(rows)
        used = batch["labels"] != -100
        assert not (used & (batch["attention_mask"] == 0)).any()
        hidden += int(used.sum())
        masked += int((batch["input_ids"][used] == task.setting.tokenizer.mask_token_id).sum())
        kept = batch["labels"] == -100
        assert (
            batch["input_ids"][0, :10][kept[0, :10]]
            == torch.tensor(rows[0]["input_ids"])[kept[0, :10]]
        ).all()
    # Binomial with 12000 draws: five standard deviations.
    assert abs(hidden / 12000 - 0.3) < 5 * (0.3 * 0.7 / 12000) ** 0.5
    assert abs(masked / hidden - 0.8) < 5 * (0.8 * 0.2 / hidden) ** 0.5
    tiny = MaskedLm(Setting(cases.letter_tokenizer(), 64, MaskedLm.Options(mask_share=1e-9)))
    assert (tiny.collate(rows)["labels"] != -100).sum() == 1


def test_scores():
    assert spans(["B-A", "I-A", "O", "I-B", "B-B"]) == {(0, 2, "A"), (3, 4, "B"), (4, 5, "B")}
    assert spans(["NOUN", "NOUN", "VERB"]) == {(0, 2, "NOUN"), (2, 3, "VERB")}
    assert span_f1([["B-A", "O"]], [["B-A", "B-A"]]) == pytest.approx(2 / 3)
    assert span_f1([["O"]], [["O"]]) == 0.0
    assert macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx(2 / 3)


def test_the_contrastive_loss_is_that_of_a_classifier_over_the_batch():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            states = torch.nn.functional.one_hot(input_ids, 96).float()
            return type("Out", (), {"last_hidden_state": states})

    task = Embeddings(Setting(cases.letter_tokenizer(), 64, Embeddings.Options(temperature=0.5)))
    rows = [
        task.encode(row)[0].features
        for row in ({"anchor": "a", "positive": "a"}, {"anchor": "b", "positive": "b"})
    ]
    loss, out = task.loss(Fixed(), task.collate(rows))
    # Padding is left out: a text of one letter is one unit vector.
    assert torch.equal(out["logits"], torch.eye(2) / 0.5)
    assert loss.item() == pytest.approx(-2 + torch.logsumexp(torch.tensor([2.0, 0.0]), 0).item())
    assert task.keep_of_logits(
        torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1])
    ).tolist() == [1, 2]
