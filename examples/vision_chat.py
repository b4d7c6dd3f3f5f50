"""Answer questions about images with LoRA on a model for images and texts.

    python examples/vision_chat.py --model PATH_OR_ID --out out/vision       # needs the extra "vision"

The images are drawn here. The loss is on the answers alone.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from peftkit import generate, train

CORNERS = {"triangle": 3, "square": 4, "circle": 60}
COLOURS = ["red", "green", "blue", "black", "orange"]


def questions(count, seed):
    """Rows with ``image``, ``prompt`` and ``completion``."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        image, shape, colour = (
            Image.new("RGB", (64, 64), "white"),
            draw.choice(list(CORNERS)),
            draw.choice(COLOURS),
        )
        circle = (draw.randint(20, 44), draw.randint(20, 44), draw.randint(10, 20))
        ImageDraw.Draw(image).regular_polygon(circle, CORNERS[shape], fill=colour)
        rows.append({"image": image, "prompt": "What is drawn?", "completion": f"{colour} {shape}"})
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default="llava-hf/llava-interleave-qwen-0.5b-hf", help="folder or hub id"
)
parser.add_argument("--out", type=Path, default=Path("out/vision"))
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

held_out = questions(8, seed=1)
result = train(
    {
        "model": args.model,
        "task": "vision_chat",
        "strategy": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": questions(100, seed=0), "eval": held_out},
        "training": {"max_steps": args.steps, "batch_size": 2, "lr": 5e-4, "samples": 0},
        "out": str(args.out),
    },
    say=print,
)
for row in held_out[:3]:
    answer = generate(args.out, [row["prompt"]], images=[row["image"]], max_new_tokens=8)[0]
    print(f"{row['prompt']} -> {answer} (expected {row['completion']})")
