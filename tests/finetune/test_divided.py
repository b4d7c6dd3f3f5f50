"""Two processes that divide the weights of a model (FSDP2) train as processes that have the whole model."""

import json
import re
import subprocess
import sys
from functools import partial

import divided_numbers
import finetune_cases as cases
import pytest
import torch
from finetune_processes import torchrun
from markers import slow_if
from process_cases import (
    WHOLE_BATCHES,
    as_process,
    detector,
    files,
    largest,
    losses,
    run_three,
    weights,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from peftkit.errors import ContractError
from peftkit.finetune import read_recipe
from peftkit.finetune.parallel_limits import require_parallel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


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
    # the norm after its blocks needs their last one in its backward
    "DETR": WHOLE_BATCHES["DETR"],
    # its heads are shared with the decoder
    "D-FINE": detector("d_fine", num_denoising=0),
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
