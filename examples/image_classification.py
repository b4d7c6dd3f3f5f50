"""Classify images: unfreeze a Vision Transformer block by block.

    python examples/image_classification.py --model PATH_OR_ID --out out/shapes       # needs the extra "vision"

The images are drawn here: one shape of any colour, size and place. Rows may have images of Pillow, as here, or paths; a folder with one
folder of images for each class needs no rows (examples/recipes/image_classification.yaml).
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from peftkit import train

CORNERS = {"triangle": 3, "square": 4, "circle": 60}
COLOURS = ["red", "green", "blue", "black", "orange"]


def shapes(count, seed):
    """Rows with ``image`` and ``label``."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        image, label = Image.new("RGB", (64, 64), "white"), draw.choice(list(CORNERS))
        circle = (draw.randint(20, 44), draw.randint(20, 44), draw.randint(10, 20))
        pen = ImageDraw.Draw(image)
        pen.regular_polygon(circle, CORNERS[label], fill=draw.choice(COLOURS))
        rows.append({"image": image, "label": label})
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out/shapes"))
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

result = train(
    {
        "model": args.model,
        "task": "image_classification",
        "strategy": "gradual",
        "data": {"train": shapes(300, seed=0), "eval": shapes(60, seed=1)},
        "training": {"max_steps": args.steps, "batch_size": 16, "lr": 1e-4},
        "out": str(args.out),
    },
    say=print,
)
print(f"accuracy on other drawings: {result.metrics['eval_accuracy']:.3f}")
