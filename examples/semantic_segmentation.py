"""Name the class of each pixel (semantic segmentation) with LoRA.

    python examples/semantic_segmentation.py --model PATH_OR_ID --out out/pixels       # needs the extra "vision"

The images are drawn here, with their masks: the number of a pixel in the mask is the place of its class in ``classes``.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from peftkit import train

CLASSES = ["background", "triangle", "circle"]
CORNERS = {"triangle": 3, "circle": 60}
COLOURS = ["red", "green", "blue", "black", "orange"]


def drawings(count, seed):
    """Rows with ``image`` and ``mask``, one shape in each half."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        image, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), 0)
        for x in (16, 48):
            label = draw.choice(list(CORNERS))
            circle = (x, draw.randint(16, 48), draw.randint(8, 16))
            for target, fill in (
                (image, draw.choice(COLOURS)),
                (mask, CLASSES.index(label)),
            ):
                ImageDraw.Draw(target).regular_polygon(circle, CORNERS[label], fill=fill)
        rows.append({"image": image, "mask": mask})
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="nvidia/mit-b0", help="folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out/pixels"))
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

result = train(
    {
        "model": args.model,
        "task": {"name": "semantic_segmentation", "classes": CLASSES},
        "strategy": {"name": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": drawings(200, seed=0), "eval": drawings(40, seed=1)},
        "training": {"max_steps": args.steps, "batch_size": 8, "lr": 1e-3},
        "out": str(args.out),
    },
    say=print,
)
print(f"mean IoU on other drawings: {result.metrics['eval_mean_iou']:.3f}")
