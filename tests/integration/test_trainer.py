"""The Hugging Face Trainer over a wrapped model: stock PEFT's losses, checkpoints and results, with every layer fused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from integration.support import (
    LLAMA_FORWARD,
    LOSS_TOLERANCE,
    WIDE_FORWARD,
    adapter_tensors,
    fused_calls,
    largest_difference,
    long_rows,
    times,
    tiny_peft,
    trainer,
    wide_llama,
)
from safetensors.torch import load_file

# The name that every supported version of transformers knows.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

CHECKPOINTED_FORWARD = Counter(
    lora_qkv=4, lora_linear=4, lora_swiglu_mlp=4, frozen_rms_norm=9, linear_cross_entropy=1
)
"""As ``LLAMA_FORWARD`` where both layers run a second time in the backward pass."""

WITHOUT_LOSS = LLAMA_FORWARD - Counter(linear_cross_entropy=1)
"""The Trainer smooths labels itself: it calls the model without labels and reads the logits."""

SETTINGS = {
    "plain": ({}, LLAMA_FORWARD),
    "accumulation": ({"gradient_accumulation_steps": 2, "max_steps": 10}, LLAMA_FORWARD),
    "checkpointing": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        CHECKPOINTED_FORWARD,
    ),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        CHECKPOINTED_FORWARD,
    ),
    "label smoothing": ({"label_smoothing_factor": 0.1}, WITHOUT_LOSS),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_equal_those_of_stock_peft(setting, tmp_path):
    changes, forward = SETTINGS[setting]
    # Plain gradient descent: Adam would forgive a gradient with a wrong factor.
    changes = {"optim": "sgd", "learning_rate": 0.1, **changes}
    stock = trainer(tiny_peft(fused=False), tmp_path, **changes)
    stock.train()
    fused = trainer(tiny_peft(fused=True), tmp_path, **changes)
    with fused_calls() as calls:
        fused.train()

    assert calls == times(forward, 20)
    assert fused.losses == pytest.approx(stock.losses, rel=0, abs=LOSS_TOLERANCE)
    untrained = adapter_tensors(tiny_peft(fused=True))
    assert largest_difference(adapter_tensors(fused.model), untrained) > 5e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_with_fused_attention_equal_those_of_stock_peft(checkpointing, tmp_path):
    changes = {"optim": "sgd", "learning_rate": 0.1, "gradient_checkpointing": checkpointing}
    runs = {}
    for fused in (False, True):
        runs[fused] = trainer(tiny_peft(fused=fused, base=wide_llama()), tmp_path, **changes)
        runs[fused].train_dataset = long_rows(16)
        with fused_calls() as calls:
            runs[fused].train()

    passes = 2 if checkpointing else 1
    assert calls["attention"] == 20 * passes * WIDE_FORWARD["attention"]
    assert calls["peft"] == 0
    assert runs[True].losses == pytest.approx(runs[False].losses, rel=0, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_losses_with_dropout(use_reentrant, tmp_path):
    plain = trainer(tiny_peft(fused=True, lora_dropout=0.2), tmp_path, max_steps=8)
    plain.train()
    checkpointed = trainer(
        tiny_peft(fused=True, lora_dropout=0.2),
        tmp_path,
        max_steps=8,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    with fused_calls() as calls:
        checkpointed.train()

    assert calls == times(CHECKPOINTED_FORWARD, 8)
    assert checkpointed.losses == pytest.approx(plain.losses, rel=0, abs=LOSS_TOLERANCE)


def test_accumulated_batches_equal_one_larger_batch(tmp_path):
    larger = trainer(tiny_peft(fused=True), tmp_path, max_steps=10, per_device_train_batch_size=4)
    larger.train()
    accumulated = trainer(
        tiny_peft(fused=True), tmp_path, max_steps=10, gradient_accumulation_steps=2
    )
    with fused_calls() as calls:
        accumulated.train()

    assert calls == times(LLAMA_FORWARD, 20)
    halves = np.array(accumulated.losses).reshape(10, 2)
    # Each half is its sum over the labels of the whole batch: halves with unequal numbers of labels show it.
    np.testing.assert_allclose(halves.sum(1), larger.losses, rtol=0, atol=LOSS_TOLERANCE)


def test_bf16_autocast_is_as_close_to_float32_as_stock_peft(tmp_path):
    truth = trainer(tiny_peft(fused=False), tmp_path)
    truth.train()
    stock = trainer(tiny_peft(fused=False), tmp_path, bf16=True)
    stock.train()
    fused = trainer(tiny_peft(fused=True), tmp_path, bf16=True)
    with fused_calls() as calls:
        fused.train()

    assert calls == times(LLAMA_FORWARD, 20)
    error = np.abs(np.subtract(fused.losses, truth.losses)).max()
    error_of_stock = np.abs(np.subtract(stock.losses, truth.losses)).max()
    assert error_of_stock > 100 * LOSS_TOLERANCE, "nothing ran in bf16"
    assert error <= 2 * error_of_stock


def test_checkpoint_holds_the_adapter_alone(tmp_path):
    for fused in (False, True):
        run = trainer(
            tiny_peft(fused=fused),
            tmp_path / str(fused),
            max_steps=2,
            save_strategy="steps",
            save_steps=2,
        )
        run.train()

    folders = [tmp_path / str(fused) / "checkpoint-2" for fused in (False, True)]
    stock_files, files = ({path.name for path in folder.iterdir()} for folder in folders)
    assert files == stock_files
    weights = {name for name in files if name.endswith((".safetensors", ".bin", ".pt", ".pth"))}
    assert weights == {
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "training_args.bin",
    }
    stock_tensors, tensors = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert tensors.keys() == stock_tensors.keys()
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    for config in configs:
        config["target_modules"].sort()  # PEFT writes a set in the order it happens to have
    assert configs[0] == configs[1]


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": 2,
    }
    whole = trainer(tiny_peft(fused=True, lora_dropout=0.2), tmp_path, **settings)
    whole.train()
    rest = trainer(tiny_peft(fused=True, lora_dropout=0.2), tmp_path / "rest", **settings)
    with fused_calls() as calls:
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert calls == times(LLAMA_FORWARD, 6)
    assert rest.losses == whole.losses[6:]
    assert largest_difference(adapter_tensors(rest.model), adapter_tensors(whole.model)) == 0.0


def test_best_model_is_loaded_at_the_end(tmp_path):
    # The largest loss counts as the best here, so that the best checkpoint is the first one, not the last.
    run = trainer(
        tiny_peft(fused=True),
        tmp_path,
        max_steps=9,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.eval_dataset = run.train_dataset
    run.train()

    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-9" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(run.model)
    assert largest_difference(loaded, best) == 0.0
    assert largest_difference(loaded, last) > 1e-3
    with fused_calls() as calls:
        assert run.evaluate()["eval_loss"] == run.state.best_metric
    assert calls == times(LLAMA_FORWARD, 2)


def test_evaluate_and_predict_equal_stock_peft(tmp_path):
    def accuracy(prediction) -> dict[str, float]:
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        seen = labels != -100
        return {
            "accuracy": float((logits.argmax(-1) == labels)[seen].mean()),
            "mean_logit": float(logits[seen].mean()),
        }

    results = {}
    for fused in (False, True):
        run = trainer(
            tiny_peft(fused=fused),
            tmp_path,
            compute_metrics=accuracy,
            per_device_eval_batch_size=2,
        )
        with fused_calls() as calls:
            metrics = run.evaluate()
            prediction = run.predict(run.eval_dataset)
        results[fused] = metrics, prediction
    assert calls == times(LLAMA_FORWARD, 6)

    (stock_metrics, stock), (metrics, predicted) = results[False], results[True]
    for name in ("eval_loss", "eval_accuracy", "eval_mean_logit"):
        assert metrics[name] == pytest.approx(stock_metrics[name], rel=0, abs=LOSS_TOLERANCE)
    assert predicted.predictions.shape == (6, 12, 96)
    scale = np.abs(stock.predictions).max()
    allowed = 32 * torch.finfo(torch.float32).eps * scale
    np.testing.assert_allclose(predicted.predictions, stock.predictions, rtol=0, atol=allowed)
    np.testing.assert_array_equal(predicted.label_ids, stock.label_ids)


def test_trainer_saves_what_save_model_of_peft_saves(tmp_path):
    run = trainer(tiny_peft(fused=True), tmp_path / "run", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert not list(Path(tmp_path / "saved").glob("model*"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert largest_difference(saved, peft.get_peft_model_state_dict(run.model)) == 0.0
