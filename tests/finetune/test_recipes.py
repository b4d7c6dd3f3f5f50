"""Every example recipe runs as it is written, except for the model, the data, the length and the folder."""

import json
from pathlib import Path

import detection_cases
import distill_cases
import finetune_cases as cases
import pytest
import retrieval_cases
import segmentation_cases
import speech_cases
import unlabelled_cases as unlabelled
import vision_chat_cases

from peftkit.finetune import read_recipe
from peftkit.finetune.tasks import TASKS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SHORT = (
    "training.max_steps=6",
    "training.epochs=null",
    "training.batch_size=4",
    "training.seq_len=64",
)

# The tiny models of these tasks have fewer positions.
SHORT_TEXTS = ("image_text_retrieval", "speech_seq2seq", "text_to_speech")

LETTERS = "abcdefghijklmnopqrstuvwx"


def texts(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(24)))
    return folder


DATA = {
    "sft": ("llama", lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.chats(80))),
    "preference": (
        "llama",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [{"prompt": c, "chosen": c * 2, "rejected": c * 3} for c in LETTERS],
        ),
    ),
    "causal_lm": ("llama", lambda folder: texts(folder / "texts")),
    "masked_lm": ("masked bert", lambda folder: texts(folder / "texts")),
    "text_classification": (
        "bert",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", [{"review": "ab" * (i % 3 + 1), "stars": i % 3} for i in range(24)]
        ),
    ),
    "token_classification": (
        "bert",
        lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.tagged(24)),
    ),
    "seq2seq": (
        "t5",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [{"article": c * 4, "summary": c} for c in LETTERS],
        ),
    ),
    "question_answering": (
        "bert",
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [
                {"question": "?", "context": f"{c} xyz" * 12, "answer": c, "answer_start": 0}
                for c in LETTERS
            ],
        ),
    ),
    "image_classification": ("vit", lambda folder: cases.images(folder / "images", 8)),
    "span_corruption": ("t5", lambda folder: texts(folder / "texts")),
    "contrastive": ("bert", lambda folder: texts(folder / "texts")),
    "contrastive_images": ("vit", lambda folder: cases.images(folder / "images", 8)),
    "audio_classification": (
        speech_cases.save_audio,
        lambda folder: speech_cases.sounds(folder / "s"),
    ),
    "speech_ctc": (
        speech_cases.save_ctc,
        lambda folder: cases.write_jsonl(folder / "d.jsonl", speech_cases.speech(folder / "s", 24)),
    ),
    "text_to_speech": (
        speech_cases.save_speecht5,
        lambda folder: cases.write_jsonl(folder / "d.jsonl", speech_cases.spoken(folder / "s", 24)),
    ),
    "speech_seq2seq": (
        speech_cases.save_whisper,
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", speech_cases.speech(folder / "s", 24, 16000)
        ),
    ),
    "embeddings": ("bert", lambda folder: cases.write_jsonl(folder / "d.jsonl", cases.pairs(24))),
    "vision_chat": (
        lambda folder: vision_chat_cases.save(folder, "idefics3"),
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", vision_chat_cases.chats(folder / "i", 24)
        ),
    ),
    "image_text_retrieval": (
        lambda folder: retrieval_cases.save(folder, "clip"),
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl",
            [
                {"image": row["image"], "caption": row["text"]}
                for row in retrieval_cases.pairs(folder / "i", 24)
            ],
        ),
    ),
    "semantic_segmentation": (
        lambda folder: segmentation_cases.save(folder, "backbone"),
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", segmentation_cases.halves(folder / "i", 24)
        ),
    ),
    "object_detection": (
        detection_cases.save,
        lambda folder: cases.write_jsonl(
            folder / "d.jsonl", detection_cases.rectangles(folder / "i", 24)
        ),
    ),
}


def test_there_is_a_recipe_for_each_task():
    # Recipes with stages are in test_stages.py.
    others = {"domain_adaptation", "distillation", "adapters"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} - others == set(DATA) == set(TASKS)


def test_the_example_of_distillation_runs(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    teacher = distill_cases.save_teacher(tmp_path / "teacher")
    data = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(40))
    changes = [f"model={model}", f"distill.teacher={teacher}", f"data.train={data}"]
    changes += [f"out={tmp_path / 'run'}", "data.eval=0.2", *SHORT]
    cases.run("train", RECIPES / "distillation.yaml", *changes, "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert read_recipe(tmp_path / "run" / "recipe.yaml").distill.base == "nf4"


def test_the_example_of_several_adapters_runs(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    changes = [f"model={model}", f"out={tmp_path / 'run'}", "training.batch_size=4"]
    changes += ["training.seq_len=64"]
    for name, count in (("support", 20), ("code", 24)):
        data = cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.chats(count))
        changes += [f"adapters.{name}.data.train={data}", f"adapters.{name}.data.eval=0.2"]
    cases.run("train", RECIPES / "adapters.yaml", *changes, "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert {name: one["steps"] for name, one in result["adapters"].items()} == {
        "support": 8,
        "code": 5,
    }


@pytest.mark.parametrize("task", DATA)
def test_an_example_recipe_runs(task, tmp_path, one_thread):
    name, write = DATA[task]
    if callable(name):
        model = name(tmp_path / "m")
    else:
        model = cases.save_model(tmp_path / "m", name, chat=task in ("sft", "preference"))
    if task == "span_corruption":
        unlabelled.marked_tokenizer().save_pretrained(model)
    if task == "contrastive_images":
        unlabelled.vit_with_pooler(model)
    changes = [f"model={model}", f"data.train={write(tmp_path)}", f"out={tmp_path / 'run'}", *SHORT]
    if task in ("sft", "preference"):
        changes.append("data.eval=0.2")
    # The tiny models have no dropout.
    changes += ["strategy.lora_dropout=0.1"] if task == "contrastive" else []
    changes.append("training.workers=0")
    # 30 tokens of an image and the answer are more than the 64 of the other recipes.
    changes += ["training.seq_len=96"] if task == "vision_chat" else []
    changes += ["training.seq_len=20"] if task in SHORT_TEXTS else []
    if task == "image_classification":
        changes += ["strategy.blocks_per_stage=1"]
    # The tiny models have two blocks and a width of 32.
    changes += ["strategy.reduction_factor=4"] if task == "token_classification" else []
    changes += ["strategy.last_blocks=1"] if task == "causal_lm" else []
    cases.run("train", RECIPES / f"{task}.yaml", *changes, "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    before, after = (
        read_recipe(RECIPES / f"{task}.yaml"),
        read_recipe(tmp_path / "run" / "recipe.yaml"),
    )
    assert (before.task, before.strategy.name) == (after.task, after.strategy.name)
