"""Find names in sentences (token classification) with bottleneck adapters.

    python examples/named_entities.py --model PATH_OR_ID --out out/names

Sentences are made from patterns. Those of the evaluation have other people and places, so that names cannot be learnt by heart.
"""

import argparse
import random
from pathlib import Path

from peftkit import train

PATTERNS = ["{person} lives in {place} .", "in {place} we met {person} today .", "ask {person} !"]
PEOPLE = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Kurt Goedel", "Emmy Noether", "Euclid"]
PLACES = ["Paris", "New York", "Oslo", "Rio de Janeiro", "Cairo", "Hong Kong"]


def sentences(part, count, seed):
    """Rows with ``tokens`` and their ``tags``: B- starts a name, I- continues it, O is outside."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        names = {"person": draw.choice(PEOPLE[part]), "place": draw.choice(PLACES[part])}
        tokens, tags = [], []
        for word in draw.choice(PATTERNS).split():
            kind = word.strip("{}")
            parts = names.get(kind, word).split()
            tokens += parts
            tags += [
                f"{'I' if i else 'B'}-{kind}" if kind in names else "O" for i in range(len(parts))
            ]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google-bert/bert-base-cased", help="folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out/names"))
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

result = train(
    {
        "model": args.model,
        "task": "token_classification",
        "strategy": {"name": "bottleneck", "reduction_factor": 8},
        "data": {
            "train": sentences(slice(0, 4), 400, seed=0),
            "eval": sentences(slice(4, 6), 60, seed=1),
        },
        "training": {"max_steps": args.steps, "batch_size": 16, "lr": 1e-3},
        "out": str(args.out),
    },
    say=print,
)
print(f"F1 of names that were not seen in training: {result.metrics['eval_f1']:.3f}")
