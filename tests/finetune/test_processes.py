"""Two processes on the CPU train as one process does with the same batches, and an error in one of them ends both."""

import json
import re
import subprocess
import sys
from functools import partial

import distill_cases
import divided_numbers
import finetune_cases as cases
import numpy as np
import pytest
import retrieval_cases
import segmentation_cases
import torch
import unlabelled_cases
from finetune_processes import torchrun
from markers import slow_if
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftkit.errors import ContractError
from peftkit.finetune import read_recipe
from peftkit.finetune.parallel_limits import require_parallel
from peftkit.finetune.tasks.contrastive_images import ContrastiveImages
from peftkit.finetune.trainer import total_steps

STRATEGIES = {
    "lora on NF4": {"strategy": {"name": "lora", "r": 4}, "base": "nf4"},
    "full": {"strategy": "full"},
    "gradual": {"strategy": {"name": "gradual", "stage_steps": 2}},
    "packed rows": {"task": {"name": "sft", "packing": True}, "training": {"seq_len": 24}},
    "mix": {"strategy": {"name": "mix", "lora": {"r": 2}, "bottleneck": {}}},
}


DIVIDED = {
    "float32": {},
    "int8": {"base": "int8"},
    "fp8": {"base": "fp8"},
    "DoRA": {"strategy": {"name": "lora", "r": 4, "use_dora": True}, "base": "nf4"},
    "bottleneck": {"strategy": "bottleneck"},
    "prefix": {"strategy": "prefix"},
    "heads": {"strategy": {"name": "lora", "r": 4, "modules_to_save": ["lm_head"]}},
}
"""Recipes whose frozen weights are divided."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def write_recipe(model, tmp_path, task="sft", training=None, rows=None, **changes):
    """A recipe of batches of 4 rows, and the 40 rows; all but 8 are for training."""
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows or cases.chats(40))
    settings = {"max_steps": 6, "checkpoint_every": 3, "samples": 1, "best_metric": "last"}
    # Adam divides by the gradient, so the rounding of a gradient near zero would decide about a whole update.
    settings |= {"optimizer": "sgd", "lr": 0.3}
    values = cases.recipe(
        model,
        task,
        data,
        tmp_path / "whole",
        data={"eval": 0.2},
        training={**settings, **(training or {})},
        **changes,
    )
    return cases.write_recipe(tmp_path / "r.yaml", values)


def weights(folder):
    (file,) = folder.glob("[am][do][ad]*/*model.safetensors")  # adapter or model
    return load_file(file)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor(
        [v for line in lines for n, v in line.items() if n in ("loss", "eval_loss")]
    )


def largest(first, second):
    return max((first[name].float() - second[name].float()).abs().max() for name in first)


def assert_trained_alike(whole, splits, parts):
    """``parts`` may differ from ``whole`` by twice as much as ``splits``, which add the same batches in parts in one process."""
    assert len(losses(whole)) == len(losses(parts)) == 8
    first, second = weights(whole), weights(parts)
    rival = max(largest(first, weights(split)) for split in splits)
    assert first.keys() == second.keys()
    eps = torch.finfo(torch.float32).eps
    moved = max(tensor.float().abs().max() for tensor in first.values())
    assert largest(first, second) <= 2 * rival + eps * moved
    rival = max((losses(whole) - losses(split)).abs().max() for split in splits)
    allowed = 2 * rival + eps * losses(whole).abs().max()
    assert (losses(whole) - losses(parts)).abs().max() <= allowed
    # Otherwise a run on other rows would pass.
    assert losses(whole).diff().abs().min() > 10 * allowed


def files(folder):
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    return {name for name in found if "rng_state" not in name}


def run_three(file, tmp_path, *arguments, **wanted):
    """The run in one process, in one process with one row or half the rows in a forward, and in two processes."""
    half = "training.batch_size=2", "training.eval_batch_size=4"
    cases.run("train", file)
    for rows in (1, 2):
        split = f"training.batch_size={rows}", f"training.gradient_accumulation={4 // rows}"
        cases.run("train", file, *split, half[1], f"out={tmp_path / f'split-{rows}'}")
    parts = tmp_path / "parts"
    printed = torchrun(
        "train", file, half[0], "training.eval_batch_size=2", f"out={parts}", *arguments, **wanted
    )
    assert_trained_alike(tmp_path / "whole", [tmp_path / "split-1", tmp_path / "split-2"], parts)
    return printed


def test_two_processes_train_as_one(model, tmp_path, one_thread):
    file = write_recipe(model, tmp_path)
    counts = tmp_path / "counts.json"
    printed = run_three(file, tmp_path, counts=counts)
    assert printed.count("finished: ") == printed.count("step 6/6: loss") == 1
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert "2 x 1 in each of 2 processes" in (tmp_path / "parts" / "report.md").read_text()
    ran = json.loads(counts.read_text())
    assert ran["loss"] >= 6
    assert ran["stock"] == 0
    printed = cases.run(
        "train", file, "training.batch_size=2", f"out={tmp_path / 'parts'}", "resume=true", code=1
    )
    assert "was started with 2, so its batches had another size" in printed


def assert_same_divided(file, tmp_path, *overrides):
    """Divided weights are put together exactly, so everything ends as in processes that have the whole model."""
    batch = "training.batch_size=2", "training.eval_batch_size=2", *overrides
    printed = torchrun("train", file, *batch, f"out={tmp_path / 'all'}")
    assert "of frozen weights in each process" not in printed
    counts = tmp_path / "counts.json"
    printed = torchrun(
        "train", file, *batch, "training.fsdp=true", f"out={tmp_path / 'part'}", counts=counts
    )
    sizes = re.findall(r"([\d,]+) of ([\d,]+) bytes of frozen weights in each process", printed)
    kept, whole = (int(size.replace(",", "")) for size in sizes[0])
    # Rows that two processes cannot share equally are padded.
    assert 0.5 <= kept / whole < 0.55
    assert largest(weights(tmp_path / "all"), weights(tmp_path / "part")) == 0
    assert torch.equal(losses(tmp_path / "all"), losses(tmp_path / "part"))
    answers = [json.loads((tmp_path / run / "samples.json").read_text()) for run in ("all", "part")]
    assert answers[0] == answers[1]
    assert "after" in answers[0][0]
    return json.loads(counts.read_text())


@pytest.mark.slow
def test_a_divided_base_trains_to_the_same_bits(model, tmp_path):
    file = write_recipe(model, tmp_path, base="nf4")
    ran = assert_same_divided(file, tmp_path, "training.gradient_checkpointing=true")
    assert ran["stock"] == 0
    assert ran["loss"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVIDED)
def test_every_divided_base_trains_to_the_same_bits(name, model, tmp_path):
    assert_same_divided(write_recipe(model, tmp_path, **DIVIDED[name]), tmp_path)


TRAINED = {
    "full": {"strategy": "full"},
    "tied": {"strategy": "full"},
    "partial": {"strategy": {"name": "partial", "last_blocks": 1}},
    "gradual": {"strategy": {"name": "gradual", "stage_steps": 2}},
}
"""Recipes whose trained weights are divided."""


@pytest.mark.parametrize("name", slow_if("tied".__ne__, TRAINED))
def test_trained_weights_can_be_divided(name, model, tmp_path, one_thread):
    if name == "tied":
        model = cases.save_model(tmp_path / "tied", "llama", chat=True)
        tied = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=True)
        tied.save_pretrained(model)
    file = write_recipe(model, tmp_path, **TRAINED[name])
    printed = run_three(file, tmp_path, "training.fsdp=true")
    sizes = re.findall(r"([\d,]+) of ([\d,]+) bytes of weights in each process", printed)
    kept, whole = (int(size.replace(",", "")) for size in sizes[0])
    assert 0.5 <= kept / whole < 0.55
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_divided_training_resumes_to_the_same_bits(model, tmp_path):
    training = {
        "optimizer": "adamw_torch",
        "lr": 1e-3,
        "batch_size": 1,
        "gradient_accumulation": 2,
        "best_metric": "loss",
    }
    file = write_recipe(model, tmp_path, strategy="full", training=training)
    torchrun("train", file)
    divided = "training.fsdp=true", f"out={tmp_path / 'divided'}"
    torchrun("train", file, *divided)
    again = "training.fsdp=true", f"out={tmp_path / 'again'}"
    printed = torchrun("train", file, *again, code=1, kill=5)
    assert "finished: " not in printed
    assert "resuming from checkpoint-3" in torchrun("train", file, *again, "resume=true")
    runs = [tmp_path / run for run in ("whole", "divided", "again")]
    assert largest(weights(runs[1]), weights(runs[2])) == 0
    # The norm of the gradients is added up in another order.
    for first, second in zip(*(weights(run).values() for run in runs[:2]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), rtol=1e-5, atol=0)
    states = [
        torch.load(run / "checkpoints" / "checkpoint-6" / "optimizer.pt")["state"] for run in runs
    ]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        shapes = {name: value.shape for name, value in state.items()}
        assert shapes == {name: value.shape for name, value in states[1][number].items()}
        for name in state:
            assert torch.equal(states[1][number][name], states[2][number][name])


def test_what_cannot_be_divided_into_parts_is_refused(model, tmp_path, monkeypatch):
    divided = {"training": {"fsdp": True}}
    recipe = read_recipe(write_recipe(model, tmp_path, **divided))
    with pytest.raises(
        ContractError, match="but there is one process; start the run with torchrun"
    ):
        require_parallel(recipe)
    as_process(monkeypatch, 2)
    require_parallel(recipe)
    for changes, message in (
        ({"training": {"fsdp": True, "optimizer": "adafactor"}}, "does not step on parts of them"),
        ({"task": "preference"}, "has a trainer of its own, which needs whole weights"),
        ({"strategy": {"name": "full", "keep_zeros": True}}, "keep_zeros=true, which compares"),
    ):
        values = {"strategy": "full", **divided, **changes}
        with pytest.raises(ContractError, match=message):
            require_parallel(read_recipe(write_recipe(model, tmp_path, **values)))


def test_an_error_in_one_process_ends_all_with_one_message(model, tmp_path):
    file = write_recipe(model, tmp_path)
    printed = torchrun("train", file, code=1, error=3)
    assert printed.count("ContractError: the second process has failed") == 1
    assert "step 2/6" in printed
    assert "step 3/6" not in printed
    assert "finished: " not in printed


def segformer_without_dropout(folder):
    file = segmentation_cases.save(folder) / "config.json"
    none = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | none))
    return folder


def partly_labelled(rows):
    """Rows of masks with other numbers of labelled pixels each."""
    for number, row in enumerate(rows):
        mask = np.array(Image.open(row["mask"]))
        mask[: number % 30] = 255
        Image.fromarray(mask).save(row["mask"])
    return rows


WHOLE_BATCHES = {
    "embeddings": (
        partial(cases.save_model, name="bert"),
        lambda folder: [
            {"anchor": chr(97 + i % 26) + "x" * (i // 26), "positive": f"{i} {chr(97 + i % 26)}"}
            for i in range(35)
        ],
        {"task": {"name": "embeddings", "chunk": 1}},
    ),
    "contrastive_images": (
        unlabelled_cases.vit_with_pooler,
        lambda folder: segmentation_cases.halves(folder / "images", 35),
        {"task": "contrastive_images", "strategy": "full"},
    ),
    "CLIP": (
        partial(retrieval_cases.save, name="clip"),
        lambda folder: retrieval_cases.pairs(folder / "images", 35),
        {"task": "image_text_retrieval", "strategy": "full"},
    ),
    "SigLIP": (
        partial(retrieval_cases.save, name="siglip"),
        lambda folder: retrieval_cases.pairs(folder / "images", 35),
        {"task": "image_text_retrieval"},
    ),
    "segmentation": (
        segformer_without_dropout,
        lambda folder: partly_labelled(segmentation_cases.halves(folder / "images", 35)),
        # The batch norm of the head, if it is trained, normalises the rows of its process. Without the head gradients are small.
        {
            "task": "semantic_segmentation",
            "strategy": {"name": "lora", "modules_to_save": []},
            "training": {"lr": 100.0},
        },
    ),
}
"""Tasks whose loss of a batch is not the mean over its rows, with a model, rows and the recipe. 7 rows are for the evaluation."""


@pytest.mark.parametrize("name", slow_if("embeddings".__ne__, WHOLE_BATCHES))
def test_the_loss_of_a_batch_is_that_of_all_processes(name, tmp_path, one_thread, monkeypatch):
    save, rows, changes = WHOLE_BATCHES[name]
    model = save(tmp_path / "m")
    # Random views depend on the rows of a process.
    monkeypatch.setattr(ContrastiveImages, "_view", lambda self, image, draws: image)
    training = {"eval_batch_size": 4, "lr": 0.03} | changes.get("training", {})
    changes = changes | {"rows": rows(tmp_path), "training": training}
    file = write_recipe(model, tmp_path, **changes)
    cases.run("train", file)
    half = "training.batch_size=2", "training.eval_batch_size=2"
    cases.run("train", file, *half, f"out={tmp_path / 'half'}")
    torchrun("train", file, *half, f"out={tmp_path / 'parts'}", plain_views=True)
    whole, parts, part = (tmp_path / run for run in ("whole", "parts", "half"))
    other = largest(weights(whole), weights(part))
    assert largest(weights(whole), weights(parts)) < 1e-3 * other
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=1e-6)
    wanted, found = (
        json.loads((run / "result.json").read_text())["metrics"] for run in (whole, parts)
    )
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_single_number_is_trained_by_the_gradients_of_all_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run([sys.executable, *launcher, divided_numbers.__file__, tmp_path], check=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = divided_numbers.model()
    loss = sum(whole(row[None]) for row in divided_numbers.rows()) / 2
    norm = divided_numbers.step(whole, loss, torch.nn.utils.clip_grad_norm_)
    assert norm > 0.5
    torch.testing.assert_close(first["norm"], norm)
    torch.testing.assert_close(first["factor"], whole.factor.grad)
    assert torch.equal(first["own"], second["own"])
    torch.testing.assert_close(first["weights"], dict(whole.state_dict()))
    assert second["weights"] == {}


OTHERS = {
    # it writes no text
    "classes": (
        partial(cases.save_model, name="bert"),
        lambda folder: [{"text": "ab" * (1 + i % 5), "label": i % 3} for i in range(35)],
        {"task": "text_classification"},
    ),
    # their temperatures are single numbers
    "CLIP": WHOLE_BATCHES["CLIP"],
    "SigLIP": (
        *WHOLE_BATCHES["SigLIP"][:2],
        {"task": "image_text_retrieval", "strategy": "full"},
    ),
    # the last batch of its evaluation is not full
    "segmentation": WHOLE_BATCHES["segmentation"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_can_be_divided(name, tmp_path):
    save, rows, changes = OTHERS[name]
    model = save(tmp_path / "m")
    training = changes.get("training", {}) | {"batch_size": 2, "eval_batch_size": 2}
    changes = changes | {"rows": rows(tmp_path), "training": training}
    file = write_recipe(model, tmp_path, **changes)
    torchrun("train", file)
    torchrun("train", file, "training.fsdp=true", f"out={tmp_path / 'parts'}")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert largest(whole, parts) < 1e-6
    torch.testing.assert_close(
        losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5, atol=0
    )


@pytest.mark.slow
def test_stages_and_preferences_train_in_two_processes(model, tmp_path, one_thread):
    rows = [
        {"prompt": "say a", "chosen": c * 3, "rejected": c.upper()}
        for c in "abcdefghijklmnopqrst" * 2
    ]
    choices = cases.write_jsonl(tmp_path / "c.jsonl", rows)
    stages = [
        {"task": "sft"},
        {"task": "preference", "data": {"train": str(choices), "eval": 0.2}, "carry": "merge"},
    ]
    values = json.loads(write_recipe(model, tmp_path).read_text())
    values = {name: value for name, value in values.items() if name != "task"} | {"stages": stages}
    file = cases.write_recipe(tmp_path / "s.yaml", values)
    half = "training.batch_size=2", "training.eval_batch_size=4"
    cases.run("train", file)
    for rows in (1, 2):
        split = f"training.batch_size={rows}", f"training.gradient_accumulation={4 // rows}"
        cases.run("train", file, *split, half[1], f"out={tmp_path / f'split-{rows}'}")
    torchrun("train", file, half[0], "training.eval_batch_size=2", f"out={tmp_path / 'parts'}")
    for stage in ("1-sft", "2-preference"):
        splits = [tmp_path / f"split-{rows}" / stage for rows in (1, 2)]
        assert_trained_alike(tmp_path / "whole" / stage, splits, tmp_path / "parts" / stage)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_in_two_processes_as_in_one(name, model, tmp_path, one_thread):
    run_three(write_recipe(model, tmp_path, **STRATEGIES[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["logits", "hidden"])
def test_a_student_learns_in_two_processes_as_in_one(loss, model, tmp_path, one_thread):
    teacher = tmp_path / "teacher"
    if loss == "logits":
        distill_cases.save_teacher(teacher)
    else:
        distill_cases.save_deeper(teacher)
    distill = {"teacher": str(teacher), "weight": 0.7, "loss": loss}
    file = write_recipe(model, tmp_path, distill=distill)
    run_three(file, tmp_path)
    whole, split, parts = (
        torch.tensor(taught(tmp_path / name)) for name in ("whole", "split-1", "parts")
    )
    assert len(whole) == 12
    allowed = 2 * (whole - split).abs().max() + torch.finfo(torch.float32).eps * whole.abs().max()
    assert (whole - parts).abs().max() <= allowed


def taught(folder):
    """Both parts of the loss in each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [v for line in lines for n, v in line.items() if n in ("label_loss", "teacher_loss")]


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_resumes(model, tmp_path):
    dropout = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    file = write_recipe(model, tmp_path, strategy=dropout)
    torchrun("train", file)
    parts = f"out={tmp_path / 'parts'}"
    printed = torchrun("train", file, parts, code=1, kill=5)
    assert "finished: " not in printed
    assert "resuming from checkpoint-3" in torchrun("train", file, parts, "resume=true")
    assert largest(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


@pytest.mark.slow
def test_faults_are_printed_once(model, tmp_path):
    file = write_recipe(model, tmp_path)
    printed = torchrun("train", file, "training.lrr=1", code=1)
    assert printed.count("error: training.lrr=1: there is no such key") == 1
    assert not (tmp_path / "whole").exists()
    faulty = "training.lr=1e30", "training.max_grad_norm=1e30", "training.optimizer=sgd"
    printed = torchrun("train", file, *faulty, code=1)
    assert printed.count("error: the loss is") == 1
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["status"] == "failed"


def as_process(monkeypatch, count):
    for name, value in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def test_what_cannot_be_divided_is_refused(model, tmp_path, monkeypatch):
    recipe = read_recipe(write_recipe(model, tmp_path))
    objects = read_recipe(write_recipe(model, tmp_path, task="object_detection"))
    require_parallel(objects)
    as_process(monkeypatch, 4)
    require_parallel(recipe)
    with pytest.raises(ContractError, match="each of the 4 processes has only its own rows"):
        require_parallel(objects)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ContractError, match="does not work with accelerate's FSDP; start it with torchrun"
    ):
        require_parallel(recipe)


def test_steps_are_counted_over_all_processes(model, tmp_path, monkeypatch):
    file = write_recipe(model, tmp_path, training={"max_steps": None, "epochs": 2})
    recipe = read_recipe(file)
    assert total_steps(recipe, 32) == (16, 8)
    as_process(monkeypatch, 2)
    assert total_steps(recipe, 32) == (8, 4)
    assert total_steps(recipe, 33) == (10, 5)


def test_the_command_is_a_module_for_launchers(tmp_path):
    """Folders of runs in the working folder are no packages, though one is called as a package that pandas uses if it is installed."""
    (tmp_path / "bottleneck").mkdir()
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("raise SystemExit('this is no package')")
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "Usage: peftkit train" in done.stdout
