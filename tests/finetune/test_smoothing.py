"""``training.label_smoothing``: the loss is that of the definition, for every kind of model."""

import families
import finetune_cases as cases
import pytest
import torch
import transformers as hf
import vision_chat_cases as vision

from peftkit.finetune import train
from peftkit.finetune import trainer as trainer_module

SHARE = 0.2
PAIRS = [{"source": "abc" + "d" * n, "target": "b" + "a" * n} for n in range(1, 7)]


def save(folder, model):
    model.save_pretrained(folder)
    cases.letter_tokenizer().save_pretrained(folder)
    return folder


def m2m(folder):
    """An encoder-decoder without a method that makes the inputs of its decoder."""
    config = hf.M2M100Config(**families._SEQ2SEQ, dropout=0.0)
    model = hf.M2M100ForConditionalGeneration(config)
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    return save(folder, model)


CASES = {
    "llama": ("sft", lambda f: cases.save_model(f, "llama", chat=True), hf.AutoModelForCausalLM),
    "llava": ("vision_chat", lambda f: vision.save(f, "llava"), hf.AutoModelForImageTextToText),
    "t5": ("seq2seq", lambda f: cases.save_model(f, "t5"), hf.AutoModelForSeq2SeqLM),
    "m2m": ("seq2seq", m2m, hf.AutoModelForSeq2SeqLM),
    "bert": (
        "masked_lm",
        lambda f: cases.save_model(f, "masked bert"),
        hf.AutoModelForMaskedLM,
    ),
}


def smoothed(logits, labels):
    """``(1 - share)`` of the cross entropy, and ``share`` of the mean over all tokens, of the positions with a label."""
    scores = -logits.double().log_softmax(-1)
    used = labels != -100
    own = scores.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return (((1 - SHARE) * own + SHARE * scores.mean(-1)) * used).sum() / used.sum()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_definition(name, accumulation, tmp_path, monkeypatch, one_thread):
    task, build, loader = CASES[name]
    rows = {
        "sft": cases.chats(6),
        "vision_chat": vision.chats(tmp_path / "i")[:6],
        "seq2seq": PAIRS,
        "masked_lm": [{"text": "abcdefgh" * n} for n in range(1, 7)],
    }[task]
    model = build(tmp_path / "m")
    seen = []
    compute = trainer_module.RecipeTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.RecipeTrainer, "compute_loss", record)
    training = {
        "label_smoothing": SHARE,
        "max_steps": 1,
        "batch_size": 6 // accumulation,
        "gradient_accumulation": accumulation,
        "samples": 0,
    }
    found = train(cases.recipe(model, task, rows, tmp_path / "run", training=training))
    assert len(seen) == accumulation
    plain = loader.from_pretrained(model).eval()
    parts = []
    with torch.no_grad():
        for batch in seen:
            logits = plain(**batch).logits
            if task in ("sft", "vision_chat"):
                logits, batch["labels"] = logits[:, :-1], batch["labels"][:, 1:]
            parts.append((logits.flatten(0, 1), batch["labels"].flatten()))
    if task in ("sft", "vision_chat"):
        expected = smoothed(*map(torch.cat, zip(*parts, strict=True)))
    else:  # as without smoothing, these divide by the labels of each batch
        expected = sum(smoothed(*part) for part in parts) / accumulation
    assert found.metrics["train_loss"] == pytest.approx(expected.item(), rel=1e-4)
