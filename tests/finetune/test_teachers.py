"""Which teachers fit a student: models, runs, quantised ones; and each mismatch is an error that says what differs."""

import json
from types import SimpleNamespace

import datasets
import distill_cases
import finetune_cases as cases
import models
import pytest
import torch
import transformers as hf
from distill_cases import distilled

from peftkit import ContractError
from peftkit.finetune import read_recipe, train
from peftkit.finetune.comparison.entries import make_entries
from peftkit.finetune.comparison.worker import run_entry
from peftkit.finetune.distillation import prepare_distillation
from peftkit.finetune.distillation.teacher import Teacher, require_token_types

LABELLED = [{"text": c * 4, "label": "low" if c < "m" else "high"} for c in "abcdefstuvwx"]
SHORT = {"max_steps": 2, "samples": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The student, and a teacher that is another model."""
    folder = tmp_path_factory.mktemp("models")
    student = cases.save_model(folder / "student", "llama", chat=True)
    return student, distill_cases.save_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("bert") / "m", "bert")


def history(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def chats(tmp_path, count=8):
    return cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(count))


def classified(model, tmp_path, out, rows=LABELLED, **changes):
    data = cases.write_jsonl(tmp_path / f"{out}.jsonl", rows)
    changes = {"training": SHORT, "strategy": "full"} | changes
    return cases.recipe(model, "text_classification", data, tmp_path / out, **changes)


@pytest.mark.parametrize("strategy", ["full", {"name": "lora", "r": 4}], ids=["full", "lora"])
def test_a_run_teaches_another(strategy, folders, tmp_path, one_thread):
    student, teacher = folders
    rows = chats(tmp_path)
    own = cases.recipe(teacher, "sft", rows, tmp_path / "t", strategy=strategy, training=SHORT)
    train(own)
    train(distilled(student, tmp_path / "t", rows, tmp_path / "of run", training=SHORT))
    # The teacher is the trained model, not its base.
    train(distilled(student, teacher, rows, tmp_path / "of base", training=SHORT))
    first, second = (history(tmp_path / n)[0]["teacher_loss"] for n in ("of run", "of base"))
    assert abs(first - second) > 1e-3
    if strategy != "full":
        with pytest.raises(ContractError, match="name the folder of the run that trained it"):
            train(distilled(student, tmp_path / "t" / "adapter", rows, tmp_path / "x"))


def test_classes_are_taught_in_the_same_order(bert, tmp_path, one_thread):
    train(classified(bert, tmp_path, "teacher", training={"max_steps": 20, "lr": 1e-3}))
    own = {"distill": {"teacher": str(tmp_path / "teacher"), "weight": 0.9}}
    train(classified(bert, tmp_path, "student", **own, training={"max_steps": 12, "lr": 1e-3}))
    losses = [line["teacher_loss"] for line in history(tmp_path / "student")]
    assert losses[-1] < 0.5 * losses[0]
    # The model in the folder of the run is a checkpoint with a head.
    own = {"distill": {"teacher": str(tmp_path / "teacher" / "model"), "weight": 0.9}}
    train(classified(bert, tmp_path, "again", **own, training={"max_steps": 12, "lr": 1e-3}))
    assert [line["teacher_loss"] for line in history(tmp_path / "again")] == losses
    renamed = [row | {"label": {"low": "a-low", "high": "b"}[row["label"]]} for row in LABELLED]
    with pytest.raises(ContractError, match=r"its classes are 'high, low', and those of the data"):
        train(classified(bert, tmp_path, "renamed", rows=renamed, **own))
    turned = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "model")
    turned.config.id2label = {0: "low", 1: "high"}
    turned.config.label2id = {"low": 0, "high": 1}
    turned.save_pretrained(tmp_path / "turned")
    cases.letter_tokenizer().save_pretrained(tmp_path / "turned")
    own["distill"]["teacher"] = str(tmp_path / "turned")
    with pytest.raises(ContractError, match="same names in the same order"):
        train(classified(bert, tmp_path, "other order", **own))
    assert not (tmp_path / "other order").exists()


def test_a_checkpoint_without_a_head_is_no_teacher(bert, tmp_path):
    other = cases.save_model(tmp_path / "other", "bert")
    config = hf.AutoConfig.from_pretrained(other)
    config.id2label, config.label2id = {0: "high", 1: "low"}, {"high": 0, "low": 1}
    config.save_pretrained(other)
    own = {"distill": {"teacher": str(other)}}
    with pytest.raises(ContractError, match=r"has no weights for classifier\.\w+, so it knows"):
        train(classified(bert, tmp_path, "x", **own))


def test_another_vocabulary_is_refused_and_a_padded_one_is_cut(folders, tmp_path, one_thread):
    student, _ = folders
    rows = chats(tmp_path)
    padded = distill_cases.save_teacher(tmp_path / "padded", vocab_size=models.VOCAB_SIZE + 8)
    train(distilled(student, padded, rows, tmp_path / "run", training=SHORT))
    assert history(tmp_path / "run")[0]["teacher_loss"] > 0
    tokenizer = cases.letter_tokenizer(chat=True)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(padded)
    with pytest.raises(
        ContractError, match=r"1 token of its vocabulary and the student's differ, such as 'new'"
    ):
        train(distilled(student, padded, rows, tmp_path / "x"))
    # The same number of tokens, two of them exchanged.
    file = padded / "tokenizer.json"
    cases.letter_tokenizer(chat=True).save_pretrained(padded)
    known = json.loads(file.read_text())
    vocabulary = known["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(known))
    with pytest.raises(ContractError, match="2 tokens of its vocabulary"):
        train(distilled(student, padded, rows, tmp_path / "x"))


def test_a_teacher_in_nf4_teaches_nearly_the_same(folders, tmp_path, one_thread):
    rows = chats(tmp_path)
    found = []
    for base in ("fp32", "nf4"):
        out = tmp_path / base
        train(distilled(*folders, rows, out, training=SHORT, distill={"base": base}))
        found.append(history(out)[0]["teacher_loss"])
    assert found[0] != found[1]
    assert abs(found[0] - found[1]) < 0.2 * found[0]


def test_pictures_made_otherwise_are_refused(tmp_path):
    folder = cases.images(tmp_path / "i", 2)
    student = cases.save_model(tmp_path / "s", "vit")
    own = cases.recipe(student, "image_classification", folder, tmp_path / "t", strategy="full")
    own["training"] = {"max_steps": 1, "batch_size": 4}
    train(own)
    other = tmp_path / "t" / "model"
    values = own | {"out": str(tmp_path / "run"), "distill": {"teacher": str(other)}}
    train(values)
    hf.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained(
        other
    )
    with pytest.raises(ContractError, match="its processor has other settings: image_mean="):
        train(values | {"out": str(tmp_path / "x")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"weight": 1.5}}, r"distill\.weight=1\.5 is out of range; it must be at most 1 and above 0"),
        ({"distill": {"temperature": 0}}, r"distill\.temperature=0 is out of range"),
        ({"distill": {"base": "int3"}}, r"distill\.base='int3' is unknown"),
        ({"distill": {"temprature": 2}}, r"did you mean 'distill\.temperature'"),
        ({"task": "preference"}, "the task preference takes no teacher"),
        ({"task": "embeddings"}, "the task embeddings takes no teacher"),
        ({"distill": {"teacher": "m"}}, "is the model that is trained"),
        ({"training": {"fsdp": True}}, "divides the student but not the teacher among processes"),
    ],
)  # fmt: skip
def test_a_recipe_with_a_wrong_teacher_is_refused(changes, message):
    values = distilled("m", "t", "d.jsonl", "runs/x", **changes)
    with pytest.raises(ContractError, match=message):
        read_recipe(values)


def test_a_section_is_read_and_written():
    recipe = read_recipe(distilled("m", "t", "d.jsonl", "runs/x"), ["distill.temperature=4"])
    assert recipe.distill.temperature == 4
    assert read_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()
    assert recipe.to_dict()["distill"]["teacher"] == "t"
    assert read_recipe(distilled("m", "t", "d.jsonl", "x") | {"distill": False}).distill is None
    with pytest.raises(ContractError, match=r"the recipe has no distill\.teacher"):
        read_recipe(distilled("m", "t", "d.jsonl", "x") | {"distill": {}})


def test_each_stage_may_have_a_teacher(folders, tmp_path, one_thread):
    student, teacher = folders
    texts = cases.write_jsonl(tmp_path / "t.jsonl", [{"text": "abc abc"}, {"text": "xyz"}] * 4)
    values = {
        "model": str(student),
        "strategy": {"name": "lora", "r": 4},
        "training": {"batch_size": 4, "log_every": 1} | SHORT,
        "distill": {"teacher": str(teacher)},
        "stages": [
            {"task": "causal_lm", "data": {"train": str(texts)}, "distill": False},
            {"task": "sft", "data": {"train": str(chats(tmp_path))}},
        ],
        "out": str(tmp_path / "run"),
    }
    train(values)
    assert "teacher_loss" not in history(tmp_path / "run" / "1-causal_lm")[0]
    assert history(tmp_path / "run" / "2-sft")[0]["teacher_loss"] > 0
    again = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert [stage.recipe.distill is None for stage in again.stages] == [True, False]
    values["stages"][0] |= {"task": "preference"}
    del values["stages"][0]["distill"]
    with pytest.raises(ContractError, match=r"stage 1 \(preference\): .* takes no teacher"):
        read_recipe(values)


def test_a_comparison_has_the_teacher_in_each_row_that_trains(folders, tmp_path, one_thread):
    values = distilled(
        *folders, chats(tmp_path, 12), tmp_path / "out", data={"eval": 0.25}, training=SHORT
    )
    entries = {entry.name: entry for entry in make_entries(values, ["lora"])}
    assert run_entry(entries["lora"], None)["problems"] == []
    assert history(tmp_path / "out" / "lora")[0]["teacher_loss"] > 0
    # It is measured as it is.
    assert "eval_loss" in run_entry(entries["pretrained"], None)["metrics"]


def test_a_teacher_must_read_what_the_student_reads():
    class NoPositions(torch.nn.Module):
        config = hf.BertConfig()

        def forward(self, input_ids=None, attention_mask=None):
            raise AssertionError

    teacher = Teacher(NoPositions())
    teacher.require_inputs({"input_ids": 1, "labels": 1, "token_type_ids": 1})
    with pytest.raises(ContractError, match="takes no position_ids, which the student gets"):
        teacher.require_inputs({"input_ids": 1, "position_ids": 1})


def test_one_process_with_several_gpus_is_refused(monkeypatch):
    recipe = read_recipe(distilled("m", "t", "d.jsonl", "runs/x"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ContractError, match="in one process with 2 GPUs; start the run with torch"):
        prepare_distillation(recipe, None, None, None)


def test_pairs_of_texts_need_one_kind_of_tokenizer(bert, tmp_path):
    """The student's tokenizer makes no token types, and the teacher's does."""
    tokenizer = cases.letter_tokenizer()
    tokenizer.sep_token = "</s>"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    other = cases.letter_tokenizer()
    other.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = SimpleNamespace(processor="tokenizer", setting=SimpleNamespace(tokenizer=tokenizer))
    rows = {"input_ids": [[1, 9, 2], [1, 8, 8, 2]]}
    require_token_types(task, other, part_of(rows))
    rows["input_ids"].append([1, 9, 2, 9, 2])
    require_token_types(task, tokenizer, part_of(rows))
    with pytest.raises(ContractError, match="needs token_type_ids to tell the texts of a pair"):
        require_token_types(task, other, part_of(rows))


def part_of(rows):
    return SimpleNamespace(dataset=datasets.Dataset.from_dict(rows))
