"""Distillation: the distance by hand, its place in the loss of a step, and that the student follows the teacher."""

import copy
import json
import math

import distill_cases
import finetune_cases as cases
import pytest
import torch
import transformers as hf
from distill_cases import distilled
from peft import LoraConfig
from safetensors.torch import load_file

import peftkit
from peftkit import ContractError
from peftkit.finetune import train
from peftkit.finetune.distillation import Distillation
from peftkit.finetune.distillation.losses import divergence, labelled
from peftkit.finetune.distillation.teacher import Teacher
from peftkit.finetune.recipe import DistillRecipe
from peftkit.finetune.tasks.sft import Sft


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The student, and a teacher that is another model."""
    folder = tmp_path_factory.mktemp("models")
    student = cases.save_model(folder / "student", "llama", chat=True)
    return student, distill_cases.save_teacher(folder / "teacher")


def weights(folder):
    (file,) = folder.glob("*/*model.safetensors")
    return load_file(file)


def history(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_divergence_is_the_one_by_hand():
    # At T = 2 the teacher's probabilities are 3/4 and 1/4, and the student's 1/2 and 1/2.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    by_hand = 2**2 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    found = divergence(student, teacher, 2.0).item()
    assert abs(found - by_hand) <= 4 * torch.finfo(torch.float32).eps
    assert divergence(teacher, teacher, 2.0).item() == 0
    # A sum over outputs: two equal ones have twice the distance.
    twice = divergence(student.expand(2, 2), teacher.expand(2, 2), 2.0).item()
    assert abs(twice - 2 * by_hand) <= 8 * torch.finfo(torch.float32).eps


def test_columns_that_only_one_model_has_do_not_count():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=draw) for _ in range(2))
    padded = torch.cat([teacher, torch.full((3, 4), 9.0)], 1)
    assert divergence(student, padded, 1.5).equal(divergence(student, teacher, 1.5))
    assert divergence(padded, student, 1.5).equal(divergence(teacher, student, 1.5))


def test_an_output_is_compared_if_its_label_counts():
    labels = torch.tensor([[5, -100, 7, 8, -100]])
    assert labelled(labels, "next").tolist() == [[False, True, True, False, False]]
    assert labelled(labels, "same").tolist() == [[True, False, True, True, False]]
    assert labelled(torch.tensor([2, 0]), "same").tolist() == [True, True]


def models_of(folders):
    return [hf.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]


def distillation_of(teacher, **keys):
    recipe = DistillRecipe(**{"teacher": "t", "temperature": 3.0, "weight": 0.25} | keys)
    return Distillation(recipe, Sft.__new__(Sft), Teacher(teacher))


def test_the_loss_is_that_of_a_loop_over_supervised_tokens(folders):
    student, teacher = models_of(folders)
    batch = distill_cases.batch_of()
    found, number = distillation_of(teacher).loss(student(**batch), batch)
    inputs = {n: v for n, v in batch.items() if n != "labels"}
    one, other = student(**inputs).logits.double(), teacher(**inputs).logits.double()
    expected, counted = 0.0, 0
    for row in range(3):
        for place in range(11):
            if batch["labels"][row, place + 1] == -100:
                continue
            p, q = ((x[row, place] / 3).softmax(-1) for x in (other, one))
            expected += 9 * (p * (p / q).log()).sum().item()
            counted += 1
    assert number == counted
    # float32 against float64: an error of a few roundings for each of the summands.
    assert abs(found.item() - expected) <= 64 * torch.finfo(torch.float32).eps * expected
    # Padding does not count: other tokens there change nothing.
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][batch["attention_mask"] == 0] = 9
    assert distillation_of(teacher).loss(student(**other), other)[0].equal(found)


def test_the_teacher_gets_no_gradient_and_stays_in_evaluation_mode(folders):
    student, teacher = models_of(folders)
    found = distillation_of(teacher.train())
    batch = distill_cases.batch_of()
    found.loss(student(**batch), batch)[0].backward()
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_logits_that_the_fused_loss_leaves_out_are_computed(folders):
    student, teacher = models_of(folders)
    batch, gradients, kinds = distill_cases.batch_of(), [], []
    for logit_free in (True, False):
        torch.manual_seed(0)
        model = peftkit.wrap(
            copy.deepcopy(student),
            LoraConfig(r=4, target_modules=["q_proj"]),
            logit_free=logit_free,
        ).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        outputs = model(**batch)
        kinds.append(type(outputs.logits).__name__)
        distance, number = distillation_of(teacher).loss(outputs, batch)
        (outputs.loss + distance / number).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert kinds == ["LazyLogits", "Tensor"]
    for name, gradient in gradients[1].items():
        # The product with the head is summed in another order.
        allowed = 64 * torch.finfo(torch.float32).eps * gradient.abs().max()
        assert (gradients[0][name] - gradient).abs().max() <= allowed, name
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
def test_a_step_has_the_same_loss_however_it_is_divided(folders, packing, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    changes = {"strategy": "full", "task": {"name": "sft", "packing": packing}}
    found = []
    for size, batches in ((4, 1), (1, 4)):
        training = {"max_steps": 2, "batch_size": size, "gradient_accumulation": batches}
        training |= {"optimizer": "sgd", "lr": 0.5, "samples": 0, "seq_len": 24 if packing else 64}
        out = tmp_path / f"run-{size}"
        train(distilled(*folders, rows, out, training=training, **changes))
        found.append((history(out), weights(out)))
    (first, one), (second, other) = found
    eps = torch.finfo(torch.float32).eps
    for before, after in zip(first, second, strict=True):
        for name in ("loss", "label_loss", "teacher_loss"):
            assert abs(before[name] - after[name]) <= 32 * eps * abs(before[name]), name
        mixed = (before["label_loss"] + before["teacher_loss"]) / 2
        assert abs(before["loss"] - mixed) <= 8 * eps * mixed
    assert first[0]["teacher_loss"] > 0.1
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 256 * eps * tensor.abs().max(), name


def test_a_student_follows_its_teacher(folders, tmp_path, one_thread):
    """The teacher's answers are random, so the labels say nothing of them."""
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    training = {"max_steps": 40, "batch_size": 8, "lr": 1e-2, "samples": 0}
    out = tmp_path / "run"
    recipe = distilled(
        *folders, rows, out, training=training, strategy="full", distill={"weight": 1}
    )
    result = train(recipe)
    lines = history(out)
    assert lines[-1]["teacher_loss"] < 0.5 * lines[0]["teacher_loss"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["teacher_loss"], rel=1e-6)
    student, teacher = models_of(folders)
    tokenizer = cases.letter_tokenizer(chat=True)
    batches = []
    for row in cases.chats(16):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        labels = ids.clone()
        labels[:, : ids.shape[1] - 4] = -100
        batches.append({"input_ids": ids, "labels": labels})
    before = distill_cases.agreement(student, teacher, batches)
    trained = hf.AutoModelForCausalLM.from_pretrained(result.weights)
    assert distill_cases.agreement(trained, teacher, batches) > before + 0.4
    assert any("distance before training" in note for note in result.notes)
    report = (out / "report.md").read_text()
    assert "| teacher |" in report
    assert "- teacher_loss: `" in report
    assert "Distilled from" in (result.weights / "README.md").read_text()
    assert weights(out).keys() == load_file(folders[0] / "model.safetensors").keys()


def test_a_resumed_run_equals_an_uninterrupted_one(folders, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(20))
    training = {"max_steps": 6, "checkpoint_every": 3, "samples": 0, "gradient_accumulation": 2}
    lora = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    teacher = tmp_path / "teacher"
    distill_cases.save_teacher(teacher)
    values = distilled(
        folders[0], teacher, rows, tmp_path / "whole", training=training, strategy=lora
    )
    train(values)
    values["out"] = str(tmp_path / "parts")
    values["training"]["gradient_checkpointing"] = False
    train(values, "training.stop_after=4")
    distill_cases.save_teacher(teacher, seed=6)
    with pytest.raises(ContractError, match=r"the weights of distill\.teacher are not those"):
        train(values, "resume=true")
    with pytest.raises(ContractError, match=r"distill\.weight: 0\.5 before, 0\.7 now"):
        train(values, "resume=true", "distill.weight=0.7")
    distill_cases.save_teacher(teacher)
    train(values, "resume=true")
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_checkpointing_and_label_smoothing_combine_with_a_teacher(folders, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    training = {"max_steps": 2, "samples": 0}
    found = []
    for number, more in enumerate(({}, {"gradient_checkpointing": True}, {"label_smoothing": 0.1})):
        out = tmp_path / str(number)
        train(distilled(*folders, rows, out, training=training | more))
        found.append(history(out))
    plain, checkpointed, smoothed = found
    eps = torch.finfo(torch.float32).eps
    for one, other in zip(plain, checkpointed, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 64 * eps * one["loss"]
    # Before the first step the models are equal, and only the loss of the labels is smoothed.
    assert abs(plain[0]["teacher_loss"] - smoothed[0]["teacher_loss"]) <= 64 * eps * 10
    assert plain[0]["label_loss"] != smoothed[0]["label_loss"]


def test_an_evaluation_has_the_loss_of_the_labels(folders, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(12))
    training = {"max_steps": 2, "samples": 0, "best_metric": "last"}
    result = train(
        distilled(*folders, rows, tmp_path / "run", training=training, data={"eval": 0.25})
    )
    found = peftkit.evaluate(tmp_path / "run")
    assert found["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)
