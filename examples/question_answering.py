"""Answer questions with a part of a text (extractive question answering) with LoRA.

    python examples/question_answering.py --model PATH_OR_ID --out out/answers

Each text has three facts, and each question is about one of them. Texts that are longer than ``seq_len`` are read in windows.
"""

import argparse
import random
from pathlib import Path

from peftkit import train

FACTS = {
    "Where does {name} live?": ("{name} lives in {answer}. ", ["Paris", "Oslo", "Cairo", "Lima"]),
    "What does {name} play?": ("{name} plays the {answer}. ", ["flute", "violin", "drums", "harp"]),
    "How old is {name}?": ("{name} is {answer} years old. ", ["forty", "seven", "ninety", "two"]),
}
NAMES = ["Ada", "Alan", "Grace", "Kurt", "Emmy", "Sofia"]


def questions(names, count, seed):
    """Rows with ``question``, ``context``, ``answer`` and ``answer_start``, its first character in the context."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name = draw.choice(names)
        asked = draw.choice(list(FACTS))
        context, start, answer = "", 0, ""
        for question, (fact, answers) in draw.sample(list(FACTS.items()), len(FACTS)):
            found = draw.choice(answers)
            if question == asked:
                start, answer = (
                    len(context) + fact.format(name=name, answer="\0").index("\0"),
                    found,
                )
            context += fact.format(name=name, answer=found)
        question = asked.format(name=name)
        rows.append(
            {"question": question, "context": context, "answer": answer, "answer_start": start}
        )
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google-bert/bert-base-uncased", help="folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out/answers"))
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

result = train(
    {
        "model": args.model,
        "task": {"name": "question_answering", "stride": 16},
        "strategy": {"name": "lora", "r": 16},
        "data": {"train": questions(NAMES[:4], 400, 0), "eval": questions(NAMES[4:], 60, 1)},
        "training": {"max_steps": args.steps, "batch_size": 16, "seq_len": 64, "lr": 1e-3},
        "out": str(args.out),
    },
    say=print,
)
print(f"exact answers about other people: {result.metrics['eval_exact_match']:.3f}")
