"""TRL's SFTTrainer over a wrapped model: its own loss, its checkpointing and packing, and every layer fused."""

from collections import Counter

import datasets
import methods
import models
import pytest
import trl
from integration.support import (
    LOSS_TOLERANCE,
    TEXTS,
    WIDE_FORWARD,
    adapter_config,
    fused_calls,
    times,
    tiny_peft,
    trainer,
    wide_llama,
)

import peftkit
from peftkit.fuse.loss import lazy

# The name that every supported version of transformers knows, and that SFTConfig itself sets.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

BLOCKS = Counter(lora_qkv=2, lora_linear=2, lora_swiglu_mlp=2, frozen_rms_norm=4)
"""Fused calls of both layers of the tiny Llama; the last norm comes to it. TRL computes the loss with its own head."""


class RecordingSFTTrainer(trl.SFTTrainer):
    """Keeps the loss of every step as it was computed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args, **kwargs):
        """One micro-batch, recorded."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def sft(model, tokenizer, folder, peft_config=None, **changes) -> RecordingSFTTrainer:
    """An SFTTrainer with its defaults, gradient checkpointing among them, for 20 quiet steps on the CPU."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "max_length": 32,
    }
    return RecordingSFTTrainer(
        model,
        args=trl.SFTConfig(**settings | changes),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


SETTINGS = {
    "defaults": ({}, 2),
    "no checkpointing": ({"gradient_checkpointing": False}, 1),
    "packing": ({"packing": True}, 2),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_equal_those_of_stock_peft(setting, tokenizer, tmp_path):
    changes, passes = SETTINGS[setting]
    stock = sft(tiny_peft(fused=False, base=wide_llama()), tokenizer, tmp_path, **changes)
    stock.train()
    fused = sft(tiny_peft(fused=True, base=wide_llama()), tokenizer, tmp_path, **changes)
    assert fused.args.gradient_checkpointing == (passes == 2)
    with fused_calls() as calls:
        fused.train()

    # Packing makes sequences long enough for the fused attention, whose mask must keep the texts apart.
    attention = 20 * passes * WIDE_FORWARD["attention"] if setting == "packing" else 0
    assert calls.pop("attention", 0) == attention
    assert calls == times(BLOCKS, 20 * passes) + Counter(frozen_rms_norm=20)
    assert fused.losses == pytest.approx(stock.losses, rel=0, abs=LOSS_TOLERANCE)
    assert fused.losses[-1] < 0.9 * fused.losses[0]


def test_model_that_trl_gave_its_adapter_can_be_accelerated(tokenizer, tmp_path):
    run = sft(models.tiny("llama"), tokenizer, tmp_path, peft_config=adapter_config(), max_steps=2)
    peftkit.accelerate(run.model, strict=True)
    with fused_calls() as calls:
        run.train()

    assert calls == times(BLOCKS, 4) + Counter(frozen_rms_norm=2)


def test_the_report_says_that_trl_computes_the_loss(tokenizer, tmp_path):
    model = tiny_peft(fused=True)
    assert peftkit.explain(model).logit_free
    sft(model, tokenizer, tmp_path)
    report = peftkit.explain(model)
    assert not report.logit_free
    assert "TRL's trainers compute the loss" in report.logit_free_reason


def test_an_adapter_on_the_head_is_refused_by_trl_and_taken_by_trainer(
    tokenizer, tmp_path, monkeypatch
):
    model = tiny_peft(fused=True, target_modules=["q_proj", "lm_head"])
    report = peftkit.explain(model)
    assert report.logit_free
    assert "SFTTrainer refuses an adapter on the output head" in report.logit_free_reason
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(model, tokenizer, tmp_path)
    calls, loss = [], lazy.linear_cross_entropy
    monkeypatch.setattr(
        lazy,
        "linear_cross_entropy",
        lambda *args, **options: calls.append(1) or loss(*args, **options),
    )
    trainer(model, tmp_path, max_steps=2).train()
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["parallel", "prefix", "gated prefix", "all three"])
def test_own_methods_train_by_sft_with_checkpointing_and_packing(method, tokenizer, tmp_path):
    losses = []
    for changes in ({"packing": True}, {"packing": True, "gradient_checkpointing": False}):
        model = methods.on(wide_llama(), method)
        run = sft(model, tokenizer, tmp_path, max_steps=10, optim="sgd", **changes)
        run.train()
        losses.append(run.losses)
    # checkpointing is SFTTrainer's default
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=LOSS_TOLERANCE)
    assert losses[0][-1] < losses[0][0]
