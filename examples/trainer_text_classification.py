"""Fine-tune a text classifier with LoRA in the Hugging Face Trainer.

    python examples/trainer_text_classification.py --model PATH_OR_ID --out out/classifier

The model learns the topic of a request. The test sentences use words that are not in the training data.
For the Trainer the model is an ordinary ``PeftModel``: checkpoints contain only the adapter and the
classification head, a restarted run continues from the last one, and the best epoch is loaded at the end.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from peftkit import LoraConfig, check, explain, wrap

TEMPLATES = {
    "music": ["play {}", "put on some {}", "I want to hear {}"],
    "weather": ["will there be {} today", "is {} on its way", "do we get {} at noon"],
    "food": ["how do I cook {}", "a recipe for {} please", "order {} for two"],
    "travel": ["find a train to {}", "how far is {}", "book a room in {}"],
}
WORDS = {
    "music": ["jazz", "a waltz", "old blues", "techno", "an opera"],
    "weather": ["rain", "snow", "a storm", "fog", "hail"],
    "food": ["soup", "rice", "a pizza", "lentils", "noodles"],
    "travel": ["Oslo", "Lima", "Cairo", "Kyoto", "Porto"],
}
LABELS = list(TEMPLATES)


def examples(tokenizer, words, count):
    """``count`` tokenised requests with their labels, made with these words of each topic."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        label = draw.choice(LABELS)
        text = draw.choice(TEMPLATES[label]).format(draw.choice(WORDS[label][words]))
        rows.append({**tokenizer(text), "labels": LABELS.index(label)})
    return rows


def accuracy(prediction):
    """Share of requests whose topic is predicted correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or hub id"
)
parser.add_argument("--out", type=Path, default=Path("out/classifier"))
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--examples", type=int, default=400)
args = parser.parse_args()

torch.manual_seed(0)
checkpoints = args.out / "checkpoints"
checkpoints.mkdir(parents=True, exist_ok=True)
tokenizer = AutoTokenizer.from_pretrained(args.model)
options = {"id2label": dict(enumerate(LABELS)), "ignore_mismatched_sizes": True}  # a new head
base = AutoModelForSequenceClassification.from_pretrained(args.model, **options)
# "SEQ_CLS" makes PEFT train and save the new classification head along with the adapter.
model = wrap(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, task_type="SEQ_CLS"))
print(explain(model))

trainer = Trainer(
    model,
    TrainingArguments(
        str(checkpoints),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    data_collator=DataCollatorWithPadding(tokenizer),
    train_dataset=examples(tokenizer, slice(0, 3), args.examples),
    eval_dataset=examples(tokenizer, slice(3, 5), args.examples // 4),
    compute_metrics=accuracy,
)
check(model, next(iter(trainer.get_train_dataloader())))
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
model.save_pretrained(args.out / "adapter")
print(f"accuracy on words not seen in training: {trainer.evaluate()['eval_accuracy']:.3f}")
