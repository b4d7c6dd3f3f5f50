"""Prefer one kind of answer to another (DPO) with LoRA, by TRL's DPOTrainer in a recipe.

    python examples/preference.py --model PATH_OR_ID --out out/preference        # needs the extra "trl"

The better answers are dates as ISO 8601. The reference is the same model with the adapter disabled, so it needs no memory of its own. Set
HF_HUB_DISABLE_TELEMETRY=1 to keep TRL from sending usage statistics.
"""

import argparse
import random
from datetime import date, timedelta
from pathlib import Path

from peftkit import train


def choices(count, seed):
    """Rows with ``prompt``, the better answer ``chosen`` and the worse one ``rejected``."""
    draw = random.Random(seed)
    days = [date(1950, 1, 1) + timedelta(days=draw.randrange(36500)) for _ in range(count)]
    return [
        {
            "prompt": f"Write {day.strftime('%d %B %Y')} as a date.",
            "chosen": f"{day}",
            "rejected": f"It is the {day.strftime('%d. %m. %y')}.",
        }
        for day in days
    ]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or id")
parser.add_argument("--out", type=Path, default=Path("out/preference"))
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

result = train(
    {
        "model": args.model,
        "task": {"name": "preference", "beta": 0.1},
        "strategy": {"name": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": choices(200, seed=0), "eval": choices(16, seed=1)},
        "training": {"max_steps": args.steps, "batch_size": 4, "lr": 5e-5},
        "out": str(args.out),
    },
    say=print,
)
print(f"better answers that are preferred: {result.metrics['eval_rewards/accuracies']:.3f}")
