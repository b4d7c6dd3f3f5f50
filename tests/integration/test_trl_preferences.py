"""TRL's DPO, KTO and GRPO, whose reference model is the wrapped one with its adapter disabled."""

import math

import datasets
import methods
import pytest
import trl
from integration.support import LOSS_TOLERANCE, TEXTS, tiny_peft, wide_llama

STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

PAIRS = {"prompt": TEXTS, "chosen": [" the cat"] * 6, "rejected": [" a wall sang"] * 6}
VERDICTS = {
    "prompt": TEXTS,
    "completion": [" the cat", " a wall sang"] * 3,
    "label": [True, False] * 3,
}


def length(completions, **_):
    """The reward of ``GRPO``."""
    return [float(len(completion)) for completion in completions]


TRAINERS = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {"max_length": 32}, {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, VERDICTS, {"max_length": 32}, {}),
    "GRPO": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"prompt": TEXTS},
        # beta asks for the reference model
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.04},
        {"reward_funcs": length},
    ),
}


def losses(kind, model, tokenizer, folder, **changes):
    """Loss and gradient norm of every step of one short training."""
    trainer, config, data, own, extra = TRAINERS[kind]
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    run = trainer(
        model,
        args=config(**settings | own | changes),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer,
        **extra,
    )
    run.train()
    logs = run.state.log_history[:STEPS]
    return [log[name] for log in logs for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_losses_equal_those_of_stock_peft(kind, checkpointing, tokenizer, tmp_path):
    stock, fused = (
        losses(
            kind,
            tiny_peft(fused=fused, base=wide_llama()),
            tokenizer,
            tmp_path,
            gradient_checkpointing=checkpointing,
        )
        for fused in (False, True)
    )
    assert fused == pytest.approx(stock, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
    assert min(stock[1::2]) > 0


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "all three"])
def test_own_methods_start_at_their_reference_and_learn(method, tokenizer, tmp_path):
    found = losses("DPO", methods.on(wide_llama(), method), tokenizer, tmp_path)[::2]
    assert found[0] == pytest.approx(math.log(2), rel=LOSS_TOLERANCE)
    assert found[-1] < found[0]
