"""Train text embeddings on pairs: descriptions of functions and their signatures, from Python's own library.

    python examples/embeddings.py --model PATH_OR_ID --out out/embeddings

The signatures of the other rows in a batch are the wrong ones, so batches should be large; ``chunk`` limits the memory.
"""

import argparse
import importlib
import inspect
import random
from pathlib import Path

from peftkit import train

MODULES = "argparse collections csv email.message json logging pathlib random shutil statistics"
MODULES += " string subprocess tarfile tempfile textwrap urllib.request uuid zipfile"


def pairs():
    """Rows with ``anchor``, the first line of a docstring, and ``positive``, the name and parameters of its function."""
    rows = {}
    for module in map(importlib.import_module, MODULES.split()):
        owners = [module, *(cls for _, cls in inspect.getmembers(module, inspect.isclass))]
        for owner in owners:
            for name, function in inspect.getmembers(owner, inspect.isfunction):
                line = (inspect.getdoc(function) or "").partition("\n")[0]
                if len(line) > 20 and not name.startswith("_"):
                    rows[line] = f"{name}({', '.join(inspect.signature(function).parameters)})"
    found = [{"anchor": line, "positive": signature} for line, signature in sorted(rows.items())]
    random.Random(0).shuffle(found)
    return found


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or hub id"
)
parser.add_argument("--out", type=Path, default=Path("out/embeddings"))
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

rows = pairs()
result = train(
    {
        "model": args.model,
        "task": {"name": "embeddings", "temperature": 0.05, "chunk": 16},
        "strategy": {"name": "lora", "r": 8},
        "data": {"train": rows[64:], "eval": rows[:64]},
        "training": {
            "max_steps": args.steps,
            "batch_size": args.batch_size,
            "seq_len": 48,
            "lr": 5e-4,
        },
        "out": str(args.out),
    },
    say=print,
)
print(f"descriptions whose nearest signature is theirs: {result.metrics['eval_recall_at_1']:.3f}")
