"""Tasks on texts and images without labels: whole words, spans, contrast by dropout and by views, and chunks of a batch."""

import itertools
import json

import finetune_cases as cases
import models
import pytest
import torch
import unlabelled_cases as unlabelled

from peftkit import ContractError
from peftkit.finetune import evaluate, read_recipe, train
from peftkit.finetune.contrast import batch_loss, in_chunks, two_sided_loss
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.contrastive import Contrastive
from peftkit.finetune.tasks.contrastive_images import ContrastiveImages
from peftkit.finetune.tasks.masked_lm import MaskedLm
from peftkit.finetune.tasks.span_corruption import SpanCorruption, corrupt
from peftkit.finetune.tasks.text_contrast import pooled

TEXTS = [{"text": c * 3 + " " + d * 4} for c in "abcdef" for d in "uvwxyz"]


def test_whole_words_are_hidden_together():
    options = MaskedLm.Options(mask_share=0.3, whole_word=True)
    task = MaskedLm(Setting(unlabelled.word_tokenizer(), 64, options))
    texts = ["abc de fghij k", "lmnop qrs tu vw xyz abc d efg"]
    rows = [task.encode({"text": text})[0].features for text in texts]
    hidden = total = 0
    for task.round in range(200):
        batch = task.collate(rows)
        used = batch["labels"] != -100
        assert used.any()
        for number, row in enumerate(rows):
            by_word = {}
            for place, word in enumerate(row["words"]):
                by_word.setdefault(word, set()).add(bool(used[number, place]))
            assert all(len(states) == 1 for states in by_word.values())
            assert not used[number, len(row["words"]) :].any()
            hidden += sum(states == {True} for states in by_word.values())
            total += len(by_word)
    # Binomial: five standard deviations.
    assert abs(hidden / total - 0.3) < 5 * (0.3 * 0.7 / total) ** 0.5
    tiny = MaskedLm.Options(mask_share=1e-9, whole_word=True)
    labels = MaskedLm(Setting(unlabelled.word_tokenizer(), 64, tiny)).collate(rows[:1])["labels"]
    lengths = {row.count(word) for row in [rows[0]["words"]] for word in row}
    assert int((labels != -100).sum()) in lengths


def test_parts_of_a_long_text_keep_their_words():
    options = MaskedLm.Options(whole_word=True)
    task = MaskedLm(Setting(unlabelled.word_tokenizer(), 4, options))
    parts = [one.features for one in task.encode({"text": "abc de fghij"})]
    assert [part["words"] for part in parts] == [[0, 0, 0, 1], [1, 2, 2, 2], [2, 2]]


def test_whole_words_need_a_tokenizer_with_words():
    tokenizer = unlabelled.word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ContractError, match=r"task\.whole_word=true, but the tokenizer does not"):
        MaskedLm(Setting(tokenizer, 64, MaskedLm.Options(whole_word=True)))


@pytest.mark.parametrize(
    ("length", "share", "mean"), [(2, 0.15, 3), (40, 0.15, 3), (100, 0.5, 1), (30, 0.9, 2)]
)
def test_spans_and_what_stays_make_up_the_text(length, share, mean):
    ids, marks = list(range(100, 100 + length)), list(range(10))
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        source, target = corrupt(ids, marks, share, mean, draws)
        spans, current = {}, None
        for token in target:
            if token in marks:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        back = [t for token in source for t in (spans[token] if token in marks else [token])]
        assert back == ids
        taken = sum(map(len, spans.values()))
        assert taken == min(max(round(length * share), 1), length - 1)
        used = [token for token in source if token in marks]
        assert used == marks[: len(used)]
        # Between two marks there is text, so no two spans touch.
        assert all(a not in marks or b not in marks for a, b in itertools.pairwise(source))


def test_every_place_can_be_taken_out():
    draws = torch.Generator().manual_seed(0)
    ids = list(range(100, 120))
    taken = {t for _ in range(400) for t in corrupt(ids, [0, 1, 2], 0.3, 2, draws)[1]}
    assert taken >= set(ids[1:])


def test_span_corruption_learns(tmp_path, one_thread):
    model = unlabelled.t5_with_marks(tmp_path / "m")
    found = train(
        cases.recipe(
            model,
            "span_corruption",
            [{"text": "abcabcabcabc"}, {"text": "xyzxyzxyzxyz"}] * 8,
            tmp_path / "run",
            strategy="full",
            data={"eval": 0.25},
            training={"max_steps": 80, "batch_size": 8, "checkpoint_every": 80},
        )
    )
    assert (found.status, found.problems) == ("finished", [])
    assert found.metrics["eval_token_accuracy"] > 0.6
    again = evaluate(tmp_path / "run", [{"text": "abcabcabcabc"}, {"text": "xyzxyzxyzxyz"}])
    assert again["token_accuracy"] > 0.6


@pytest.mark.parametrize(
    ("name", "expected"),
    [("t5", "needs a tokenizer with the tokens <extra_id_0>"), ("llama", "has no class for Llama")],
)
def test_span_corruption_refuses_other_models(name, expected, tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", name)
    if name == "llama":
        unlabelled.marked_tokenizer().save_pretrained(model)
    with pytest.raises(ContractError, match=expected):
        train(cases.recipe(model, "span_corruption", TEXTS, tmp_path / "run"))


def bert_with_dropout(folder, rate=0.1):
    model = models.tiny("bert", dropout=rate).base_model
    model.save_pretrained(folder)
    cases.letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_contrast_by_dropout_spreads_the_texts(strategy, tmp_path, one_thread):
    model = bert_with_dropout(tmp_path / "m")
    recipe = cases.recipe(
        model,
        {"name": "contrastive", "chunk": 8},
        TEXTS,
        tmp_path / "run",
        strategy=strategy,
        data={"eval": TEXTS[:12]},
        training={"max_steps": 40, "batch_size": 12, "checkpoint_every": 1, "lr": 3e-3},
    )
    found = train(recipe)
    assert (found.status, found.problems) == ("finished", [])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert evaluate(tmp_path / "run", TEXTS[:12])["loss"] == pytest.approx(
        found.metrics["eval_loss"], rel=1e-5
    )


@pytest.mark.parametrize("task", ["contrastive", "contrastive_images", "embeddings"])
def test_smoothing_of_labels_that_do_not_exist_is_refused(task, tmp_path):
    values = cases.recipe(tmp_path, task, str(tmp_path), tmp_path / "run")
    with pytest.raises(ContractError, match=r"training.label_smoothing=0.1 has no effect"):
        read_recipe(values, ["training.label_smoothing=0.1"])


def test_contrast_by_dropout_needs_dropout(tmp_path, one_thread):
    model = bert_with_dropout(tmp_path / "m", 0.0)
    with pytest.raises(ContractError, match="needs dropout, by which a text differs from itself"):
        train(cases.recipe(model, "contrastive", TEXTS, tmp_path / "run"))
    train(
        cases.recipe(
            model,
            "contrastive",
            TEXTS,
            tmp_path / "run",
            strategy={"name": "lora", "r": 4, "lora_dropout": 0.1},
        )
    )


def gradients(model, task, batch, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    task.loss(model, batch)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_chunks_have_the_gradients_of_the_whole_batch(rate, one_thread):
    model = models.tiny("bert", dropout=rate).base_model.double().train()
    whole = Contrastive(Setting(cases.letter_tokenizer(), 64, Contrastive.Options()))
    parts = Contrastive(Setting(cases.letter_tokenizer(), 64, Contrastive.Options(chunk=5)))
    batch = whole.collate([whole.encode(row)[0].features for row in TEXTS[:7]])
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    wanted, found = gradients(model, whole, batch), gradients(model, parts, batch)
    # The first pass of each chunk, then the second in the backward, from the last chunk to the first.
    assert calls == [14, 5, 5, 4, 4, 5, 5]
    assert wanted.keys() == found.keys()
    if rate:
        # Other dropout masks, because they are drawn chunk by chunk; the same as without recomputation.
        class Plain(Contrastive):
            def loss(self, model, inputs):
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                vectors = [
                    pooled(model(input_ids=i, attention_mask=m).last_hidden_state, m, "mean")
                    for i, m in zip(ids.split(5), mask.split(5), strict=True)
                ]
                return batch_loss(torch.cat(vectors), 0.05)

        batch.pop("token_type_ids", None)
        wanted = gradients(model, Plain(parts.setting), batch)
    # The pooling and the loss are in float32. The gradients of key biases are zero, so the largest gradient of all is the measure.
    largest = max(gradient.abs().max() for gradient in wanted.values())
    bound = 8 * torch.finfo(torch.float32).eps * largest
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= bound, name


def test_chunks_keep_the_activations_of_one_chunk():
    saved = {"now": 0, "most": 0}
    size = 4

    def encode(part):
        x = part["x"]
        for _ in range(8):
            x = Counted.apply(x)
        return x

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 + 0 * x

    def pack(tensor):
        saved["now"] += len(tensor)
        saved["most"] = max(saved["most"], saved["now"])
        return tensor

    def measured(chunk):
        saved.update(now=0, most=0)
        x = torch.ones(32, 1, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = in_chunks(encode, {"x": x}, chunk)
        return saved["most"], out

    everything, _ = measured(None)
    few, out = measured(size)
    assert everything == 8 * 32
    # Of each chunk only the inputs are kept by the first pass.
    assert few <= 32
    out.sum().backward()


def test_the_two_sided_loss_is_that_of_its_paper():
    torch.manual_seed(0)
    vectors = torch.randn(6, 4, dtype=torch.float64)
    loss, _ = two_sided_loss(vectors, 0.5)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        partner = (i + 3) % 6
        others = sum(float(torch.exp(unit[i] @ unit[j] / 0.5)) for j in range(6) if j != i)
        total -= float(unit[i] @ unit[partner] / 0.5) - torch.tensor(others).log().item()
    assert loss.item() == pytest.approx(total / 6, rel=1e-6)
    assert two_sided_loss(vectors[:2], 0.5)[0].item() == 0.0
    assert batch_loss(vectors[:2], 0.5)[0].item() == 0.0


def test_contrast_of_images_learns(tmp_path, one_thread):
    model = unlabelled.vit_with_pooler(tmp_path / "m")
    data, same = (str(unlabelled.colours(tmp_path / name)) for name in ("i", "j"))
    losses = []
    for name, training in (("still", {"max_steps": 1, "lr": 1e-6}), ("run", {"max_steps": 100})):
        found = train(
            cases.recipe(
                model,
                {"name": "contrastive_images", "chunk": 5, "jitter": 0.02},
                data,
                tmp_path / name,
                strategy="full",
                data={"eval": same},
                training={"batch_size": 12, "lr": 1e-3, "checkpoint_every": 100, **training},
            )
        )
        assert (found.status, found.problems) == ("finished", [])
        losses.append(found.metrics["eval_loss"])
    # The evaluation has the same images, with the same views each time.
    assert losses[1] < 0.5 * losses[0]


def test_views_differ_and_keep_the_size(tmp_path):
    import transformers as hf

    path = sorted(cases.images(tmp_path / "i").rglob("*.png"))[0]
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16})
    task = ContrastiveImages(Setting(processor, 64, ContrastiveImages.Options()))
    batch = task.collate([{"image": str(path)}] * 3)
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    assert len({tuple(view.flatten().tolist()) for view in batch["pixel_values"]}) == 6
    still = ContrastiveImages.Options(least_crop=1.0, jitter=0.0)
    image = torch.rand(3, 16, 16)
    view = ContrastiveImages(Setting(processor, 64, still))._view(image, torch.Generator())
    assert view.shape == image.shape
    again = task.collate([{"image": str(path)}] * 3)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    task.round = 1
    other = task.collate([{"image": str(path)}] * 3)
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])


def test_embeddings_in_chunks_learn(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "bert")
    losses = {}
    for name, chunk in (("whole", None), ("parts", 5)):
        task = {"name": "embeddings", "chunk": chunk}
        train(cases.recipe(model, task, cases.pairs(16), tmp_path / name))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [e["loss"] for e in map(json.loads, lines) if "loss" in e]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4)


def test_span_corruption_marks_come_in_order():
    task = SpanCorruption(Setting(unlabelled.marked_tokenizer(), 64, SpanCorruption.Options()))
    names = task.setting.tokenizer.convert_ids_to_tokens(task.marks)
    assert names == [f"<extra_id_{number}>" for number in range(unlabelled.MARKS)]
    batch = task.collate([task.encode({"text": "abcdefghij" * n})[0].features for n in (1, 3)])
    end = task.setting.tokenizer.eos_token_id
    assert (batch["input_ids"] == end).sum() == 2
    assert (batch["labels"] == end).sum() == 2
    assert len(task.encode({"text": "a"})) == 0
