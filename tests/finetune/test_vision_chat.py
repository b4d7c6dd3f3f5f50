"""The task vision_chat: labels on the answers alone, batches of the processor, bad rows, generation with an image."""

import json

import finetune_cases as cases
import pytest
import torch
import vision_chat_cases as vision
from safetensors.torch import load_file

from peftkit import ContractError, LoraConfig, wrap
from peftkit.finetune import train
from peftkit.finetune.reached import modules_outside_loss
from peftkit.finetune.tasks.base import IGNORED, BadRow, Setting
from peftkit.finetune.tasks.vision_chat import VisionChat, with_images

STEPS = {"max_steps": 40, "batch_size": 6, "lr": 1e-2, "checkpoint_every": 20, "samples": 1}


def task_of(name, seq_len=256, **options):
    _, processor = vision.tiny(name)
    setting = Setting(processor.tokenizer, seq_len, VisionChat.Options(**options))
    setting.processor = processor
    return VisionChat(setting)


def answers(task, features):
    """The texts of the runs of labels that are not ignored."""
    labels = [label if label != IGNORED else None for label in features["labels"]]
    runs, run = [], []
    for label in [*labels, None]:
        if label is not None:
            run.append(label)
        elif run:
            runs.append(task.setting.tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("name", vision.BUILDERS)
def test_a_run_learns_and_answers_about_an_image(name, tmp_path, one_thread):
    model = vision.save(tmp_path / "m", name)
    data = cases.write_jsonl(tmp_path / "d.jsonl", vision.chats(tmp_path / "i"))
    values = cases.recipe(model, "vision_chat", data, tmp_path / "run", data={"eval": [str(data)]})
    values["training"] |= STEPS
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "colour?</s><a>«red</s>» (images: 1)" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["problems"]) == ("finished", [])
    assert result["metrics"]["eval_token_accuracy"] == 1.0
    again = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    assert again["loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-5)
    for colour in vision.COLOURS:
        image = tmp_path / "i" / f"{colour}.png"
        found = cases.run("generate", tmp_path / "run", "colour?", "--image", image)
        assert found.strip() == colour
    (sample,) = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert (sample["expected"], sample["after"]) == ("red", "red")
    assert sample["prompt"].count("<image>") <= 5
    needs = "answers prompts about images; give at least one with --image FILE"
    assert needs in cases.run("generate", tmp_path / "run", "colour?", code=1)
    nowhere = cases.run("generate", tmp_path / "run", "x", "--image", "/no.png", code=1)
    assert "the image /no.png does not exist" in nowhere
    assert (tmp_path / "run" / "adapter" / "processor_config.json").exists()


def test_a_task_without_images_refuses_them(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    train(cases.recipe(model, "sft", cases.chats(8), tmp_path / "run"))
    found = cases.run("generate", tmp_path / "run", "x", "--image", "a.png", code=1)
    assert "the task sft takes no images, but 1 were given" in found


@pytest.mark.parametrize("name", vision.BUILDERS)
@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("answers", ["a red one</s>", "two</s>"]),
        ("last_answer", ["two</s>"]),
    ],
)
def test_labels_are_the_answers_of_every_turn(name, train_on, expected, tmp_path):
    red, green, _ = vision.pictures(tmp_path).values()
    task = task_of(name, train_on=train_on)
    row = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "image", "image": red}, {"type": "text", "text": "what?"}],
            },
            {"role": "assistant", "content": "a red one"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and"},
                    {"type": "image"},
                    {"type": "image_url", "image_url": {"url": red}},
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        ],
        "images": [green],
    }
    (encoded,) = task.encode(row)
    assert answers(task, encoded.features) == expected
    assert encoded.features["images"] == [red, green, red]
    assert encoded.supervised == sum(label != IGNORED for label in encoded.features["labels"])
    ids, answer = task.prompt(row)
    assert answer == "two"
    assert encoded.features["input_ids"][: len(ids)] == ids
    assert encoded.features["input_ids"][len(ids) :] == task.setting.tokenizer("two</s>").input_ids
    assert "pixel_values" in task.context(row)


def test_labels_are_carried_over_to_the_tokens_of_images():
    def check(ids, full, expected):
        labels = [IGNORED if i in (0, 1) else i for i in ids]
        assert with_images(ids, labels, full, {0}) == expected

    check([0, 5, 6], [7, 0, 0, 7, 5, 6], [-100] * 4 + [5, 6])
    check([1, 0, 5, 0, 6], [1, 0, 0, 5, 0, 0, 6], [-100] * 3 + [5, -100, -100, 6])
    check([5, 0, 0], [5, 0, 0, 0, 0], [5] + [-100] * 4)
    check([5, 6], [5, 6], [5, 6])
    check([5, 0, 6], [4, 0, 0, 6], None)
    check([5, 0, 6], [5, 0, 0, 4], None)
    check([5, 0, 6, 0, 5], [5, 0, 7, 0, 5], None)


@pytest.mark.parametrize("name", vision.BUILDERS)
def test_a_batch_is_its_rows(name, tmp_path, one_thread):
    files = vision.pictures(tmp_path)
    task = task_of(name)
    rows = [
        {"image": files["red"], "prompt": "colour?", "completion": "red"},
        {"images": [files["blue"], files["green"]], "prompt": "both", "completion": "blue green"},
    ]
    encoded = [task.encode(row)[0] for row in rows]
    model, _ = vision.tiny(name)
    model.eval()
    with torch.no_grad():
        together = model(**task.collate([one.features for one in encoded])).loss
        alone = [model(**task.collate([one.features])).loss for one in encoded]
    shares = torch.tensor([float(one.supervised) for one in encoded])
    expected = (torch.stack(alone) * shares).sum() / shares.sum()
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("name", vision.BUILDERS)
def test_long_rows_lose_their_end_but_never_parts_of_images(name, tmp_path):
    files = vision.pictures(tmp_path)
    row = {"image": files["red"], "prompt": "x", "completion": "a" * 20}
    (whole,) = task_of(name).encode(row)
    size = whole.length - 10
    task = task_of(name, seq_len=size)
    (cut,) = task.encode(row)
    assert (cut.length, cut.supervised) == (whole.length, whole.supervised - 10)
    batch = task.collate([cut.features])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape == (1, size)
    with pytest.raises(BadRow, match=r"training.seq_len=8 cuts off parts of its images"):
        task_of(name, seq_len=8).encode(row)


FAULTS = {
    "no image": ({"images": None}, "no image"),
    "a missing file": ({"images": ["/no.png"]}, "the image /no.png does not exist"),
    "an address": ({"images": ["https://a.b/c.png"]}, "is on the web; download it"),
    "no prompt": ({"prompt": None}, "column 'prompt' is empty"),
    "no answer": ({"completion": ""}, "column 'completion' is empty"),
    "the image token in a text": ({"prompt": "<image>"}, "d.jsonl:2: the processor refuses it"),
    "a part of an unknown kind": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "message 1 has the part {'type': 'video'}",
    ),
    "too few images": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        "have 2 places for images without one of their own, but column 'images' has 1",
    ),
    "no assistant": (
        {"messages": [{"role": "user", "content": "a"}]},
        "no message has the role 'assistant'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rows_are_named(fault, tmp_path, one_thread):
    changes, expected = FAULTS[fault]
    model = vision.save(tmp_path / "m", "idefics3")
    rows = vision.chats(tmp_path / "i", 3)
    rows[1] |= changes
    data = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    file = cases.write_recipe(
        tmp_path / "r.yaml", cases.recipe(model, "vision_chat", data, tmp_path / "run")
    )
    printed = cases.run("train", file, code=1)
    assert expected in printed
    assert "d.jsonl:2: " in printed
    assert not (tmp_path / "run").exists()


def test_models_and_processors_that_do_not_fit_are_refused(tmp_path, one_thread):
    rows = vision.chats(tmp_path / "i", 3)
    text = cases.save_model(tmp_path / "text", "llama", chat=True)
    with pytest.raises(ContractError, match="has no processor of images and texts"):
        train(cases.recipe(text, "vision_chat", rows, tmp_path / "run"))
    model, processor = vision.tiny("llava")
    processor.chat_template = None
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(ContractError, match=r"LlavaProcessor has none; set task.chat_template"):
        train(cases.recipe(tmp_path / "m", "vision_chat", rows, tmp_path / "run"))
    (tmp_path / "t.jinja").write_text(vision.TEMPLATE)
    task = {"name": "vision_chat", "chat_template": str(tmp_path / "t.jinja")}
    assert train(cases.recipe(tmp_path / "m", task, rows, tmp_path / "run")).problems == []


def test_layers_outside_the_loss_get_no_adapter(tmp_path, one_thread):
    model, _ = vision.tiny("llava")
    task = task_of("llava")
    batch = task.collate([task.encode(row)[0].features for row in vision.chats(tmp_path / "i", 2)])
    flags = [p.requires_grad for p in model.parameters()]
    found = modules_outside_loss(model, batch)
    # LLaVA reads the image encoder's last layer but one.
    assert found
    assert all("vision_tower" in name and ".layers.2." in name for name in found)
    assert flags == [p.requires_grad for p in model.parameters()]
    saved = vision.save(tmp_path / "m", "llava")
    rows = vision.chats(tmp_path / "i", 4)
    for strategy in ("lora", "full"):
        run = train(
            cases.recipe(saved, "vision_chat", rows, tmp_path / strategy, strategy=strategy)
        )
        assert run.problems == []
        frozen = [note for note in run.notes if note.startswith("frozen, because the loss")]
        assert bool(frozen) is (strategy == "full")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, one_thread):
    model = vision.save(tmp_path / "m", "idefics3")
    data = cases.write_jsonl(tmp_path / "d.jsonl", vision.chats(tmp_path / "i"))
    steps = {"max_steps": 6, "batch_size": 4, "checkpoint_every": 2, "samples": 0}
    strategy = {"name": "lora", "r": 4, "lora_dropout": 0.2}
    values = cases.recipe(
        model, "vision_chat", data, tmp_path / "whole", strategy=strategy, training=steps
    )
    train(values)
    parts = values | {"out": str(tmp_path / "parts")}
    train(parts | {"training": values["training"] | {"stop_after": 3}})
    train(parts | {"resume": True})
    whole, again = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize("name", vision.BUILDERS)
def test_one_step_equals_that_of_peft(name, tmp_path):
    from peft import get_peft_model

    task = task_of(name)
    batch = task.collate([task.encode(row)[0].features for row in vision.chats(tmp_path / "i", 3)])
    results = []
    for make in (wrap, get_peft_model):
        model, _ = vision.tiny(name)
        targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "fc1"]
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        torch.manual_seed(1)
        model = make(model, config).train()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.1)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, ours), (expected, theirs) = results
    torch.testing.assert_close(loss, expected)
    assert ours.keys() == theirs.keys()
    for parameter_name, gradient in theirs.items():
        if gradient is None:
            assert ours[parameter_name] is None
        else:
            torch.testing.assert_close(ours[parameter_name], gradient)
