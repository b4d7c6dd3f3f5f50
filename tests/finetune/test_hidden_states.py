"""Distillation of hidden states: by hand, through fused layers and checkpoints, and a student that follows."""

import copy
import json

import distill_cases
import finetune_cases as cases
import pytest
import torch
import transformers as hf
from distill_cases import distilled
from peft import LoraConfig

import peftkit
from peftkit import ContractError
from peftkit.finetune import read_recipe, train
from peftkit.finetune.distillation import Distillation
from peftkit.finetune.distillation.losses import hidden_distance, token_shares
from peftkit.finetune.distillation.teacher import Teacher
from peftkit.finetune.recipe import DistillRecipe
from peftkit.finetune.tasks.sft import Sft

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student = cases.save_model(folder / "student", "llama", chat=True)
    return student, distill_cases.save_deeper(folder / "teacher")


def history(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def distillation_of(folder):
    teacher = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = DistillRecipe(teacher="t", loss="hidden")
    return Distillation(recipe, Sft.__new__(Sft), Teacher(teacher))


def test_the_distance_is_the_one_by_hand():
    student = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.full((1, 2, 2), 2.0)]
    teacher = [torch.full((1, 2, 2), float(n)) for n in (9, 9, 3, 9, 5)]
    # Layers 1 and 2 of 2 belong to 2 and 4 of 4: squares 4 and 9. Only the first token counts.
    shares = torch.tensor([[1.0, 0.0]])
    assert hidden_distance(student, teacher, shares).item() == (4 + 9) / 2
    broken = [layer.clone() for layer in student]
    broken[1][0, 1] = torch.nan
    assert hidden_distance(broken, teacher, shares).item() == (4 + 9) / 2
    with pytest.raises(
        ContractError, match=r"student are \[1, 2, 2\] and those of the teacher \[1, 2, 3\]"
    ):
        hidden_distance(student, [torch.zeros(1, 2, 3)] * 2, shares)


def test_the_tokens_of_a_row_count_as_one_without_padding():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = token_shares(torch.tensor([True, True]), {"attention_mask": mask})
    assert found.tolist() == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_of_fused_layers_are_those_of_peft(checkpointing, folders):
    batch, gradients = distill_cases.batch_of(), []
    distillation = distillation_of(folders[1])
    student = hf.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    for fused in (False, True):
        torch.manual_seed(0)
        model = peftkit.wrap(copy.deepcopy(student), LoraConfig(r=4, target_modules="all-linear"))
        if not fused:
            model = peftkit.restore(model) or model
        if checkpointing and fused:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        outputs = model.train()(**batch, **distillation.more_inputs)
        distillation.loss(outputs, batch)[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert len(plain) == 28
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        largest = gradient.abs().max()
        assert largest > 0
        assert (found[name] - gradient).abs().max() <= 256 * EPS * largest, name


def test_a_student_follows_the_hidden_states(folders, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    training = {"max_steps": 24, "batch_size": 8, "lr": 1e-2, "samples": 0}
    distill = {"loss": "hidden", "weight": 0.9}
    changes = {"training": training, "strategy": "full", "distill": distill}
    result = train(distilled(*folders, rows, tmp_path / "run", **changes))
    losses = [line["teacher_loss"] for line in history(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    assert (
        "of the loss is the distance from its hidden" in (result.weights / "README.md").read_text()
    )


def test_a_step_has_the_same_loss_however_it_is_divided(folders, tmp_path, one_thread):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    found = []
    for size, batches in ((4, 1), (1, 4)):
        training = {"max_steps": 1, "batch_size": size, "gradient_accumulation": batches}
        training |= {"samples": 0}
        out = tmp_path / str(size)
        train(distilled(*folders, rows, out, training=training, distill={"loss": "hidden"}))
        found.append(history(out)[0])
    for name in ("loss", "label_loss", "teacher_loss"):
        assert abs(found[0][name] - found[1][name]) <= 32 * EPS * found[0][name], name


def test_contradictions_are_refused(folders, tmp_path):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(8))
    for distill, message in (
        ({"temperature": 3.0}, r"distill\.temperature=3 has no effect"),
        ({"weight": 1}, "would leave the head without a gradient"),
    ):
        with pytest.raises(ContractError, match=message):
            read_recipe(distilled("m", "t", rows, "x", distill={"loss": "hidden", **distill}))
    with pytest.raises(
        ContractError, match=r"'hidden' with the task seq2seq; use distill\.loss=logits"
    ):
        read_recipe(distilled("m", "t", rows, "x", task="seq2seq", distill={"loss": "hidden"}))
    wider = distill_cases.save_teacher(tmp_path / "wider")
    with pytest.raises(ContractError, match="or a teacher of the same width"):
        train(distilled(folders[0], wider, rows, tmp_path / "x", distill={"loss": "hidden"}))
    assert not (tmp_path / "x").exists()
