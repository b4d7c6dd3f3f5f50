"""Write down what is heard (CTC) with LoRA: a model for speech learns Morse code.

    python examples/speech.py --model PATH_OR_ID --out out/speech

The recordings are made here, in a folder next to the run, with the sampling rate that the model expects. Nothing is resampled.
"""

import argparse
import array
import math
import random
import wave
from pathlib import Path

from transformers import AutoFeatureExtractor

from peftkit import train

MORSE = {"A": ".-", "B": "-...", "C": "-.-.", "D": "-.."}
UNIT = 0.06
"""Seconds of a dot; a dash has three, and so has the silence after a letter."""


def write_morse(path, text, rate):
    """A WAV file with 16 bits a sample."""
    on_and_off = "000".join("0".join("1" * (1 + 2 * (s == "-")) for s in MORSE[c]) for c in text)
    count = int(len(on_and_off) * UNIT * rate)
    heard = [int(on_and_off[int(i / rate / UNIT)]) for i in range(count)]
    tone = [round(20000 * on * math.sin(400 * math.pi * i / rate)) for i, on in enumerate(heard)]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, count, "NONE", ""))
        file.writeframes(array.array("h", tone).tobytes())


def recordings(folder, count, seed, rate):
    """Rows with ``audio``, a path, and ``text``."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        text = "".join(draw.choice(list(MORSE)) for _ in range(draw.randint(1, 4)))
        path = folder / f"{seed}-{number}.wav"
        write_morse(path, text, rate)
        rows.append({"audio": str(path), "text": text})
    return rows


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="facebook/wav2vec2-base-960h", help="folder or hub id")
parser.add_argument("--case", default="keep", help="lower, if the vocabulary has small letters")
parser.add_argument("--out", type=Path, default=Path("out/speech"))
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

rate = AutoFeatureExtractor.from_pretrained(args.model).sampling_rate
result = train(
    {
        "model": args.model,
        "task": {"name": "speech_ctc", "case": args.case},
        "strategy": {"name": "lora", "r": 16, "lora_alpha": 32},
        "data": {
            "train": recordings(args.out / "audio", 200, 0, rate),
            "eval": recordings(args.out / "audio", 20, 1, rate),
        },
        "training": {"max_steps": args.steps, "batch_size": 4, "lr": 1e-3},
        "out": str(args.out / "run"),
    },
    say=print,
)
print(f"wrong characters in other recordings: {result.metrics['eval_cer']:.3f}")
