"""Heads that share weights are trained, saved, loaded and merged as one, and adapters on one of several names are refused."""

import copy

import detection_cases as detection
import models
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from task_models import task_model
from torch import nn

from peftkit import ContractError, LoraConfig, load_adapter, load_base, merge, wrap
from peftkit.find.heads import find_heads
from peftkit.find.modules import storage_of
from peftkit.find.ties import other_names


def tied(model):
    """The names of parameters that are one, in groups, without the words that PEFT adds to them."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(storage_of(parameter), []).append(plain(name))
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def plain(name):
    for words in ("base_model.model.", "modules_to_save.default.", "original_module."):
        name = name.replace(words, "", 1)
    return name


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = detection.TIED[name]().eval()
        with torch.no_grad():
            # transformers sets the last layer of heads for boxes to zero, which would hide all others.
            for own, parameter in model.named_parameters():
                if "bbox" in own:
                    parameter.normal_(0, 0.1)
    return model


def batch():
    draw = torch.Generator().manual_seed(1)
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4, generator=draw) / 3 + 0.3}
        for _ in range(2)
    ]
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=draw), "labels": labels}


def step(model, rate=0.1, steps=2):
    """Train all that is trainable by gradient descent."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


def boxes(model):
    with torch.no_grad():
        found = model.eval()(pixel_values=batch()["pixel_values"])
    return found.logits, found.pred_boxes


def assert_same(first, second):
    for mine, yours in zip(first, second, strict=True):
        torch.testing.assert_close(mine, yours)


@pytest.mark.parametrize("name", detection.TIED)
def test_tied_heads_are_trained_as_one(name):
    model = build(name)
    groups = tied(model)
    assert groups
    heads = find_heads(model)
    assert heads.out_of_reach == {}
    inside = {n for group in groups for n in group}
    assert all(any(n.startswith(f"{head}.") for head in heads.names) for n in inside)
    whole = copy.deepcopy(model)
    assert tied(whole) == groups
    whole.requires_grad_(False)
    for own, parameter in whole.named_parameters(remove_duplicate=False):
        if any(own.startswith(f"{head}.") for head in heads.names):
            parameter.requires_grad_(True)
    adapted = wrap(model, LoraConfig(r=2))
    for own, parameter in adapted.named_parameters():
        if "lora_" in own:
            parameter.requires_grad_(False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == sum(p.requires_grad for p in whole.parameters())
    step(whole)
    step(adapted)
    after = dict(whole.named_parameters(remove_duplicate=False))
    moved = 0
    for own, parameter in adapted.named_parameters(remove_duplicate=False):
        if "modules_to_save" in own:
            torch.testing.assert_close(parameter, after[plain(own)])
            moved += 1
    assert moved >= len(inside)
    assert_same(boxes(adapted), boxes(whole))
    copies = [n for n in adapted.state_dict() if "modules_to_save" in n]
    assert {plain(n) for n in copies} >= inside


@pytest.mark.parametrize("name", detection.TIED)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_tied_heads_stay_tied_when_they_are_saved_loaded_and_merged(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    adapted = step(wrap(model, LoraConfig(r=2)))
    expected, groups = boxes(adapted), tied(build(name))
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for group in groups:
        (first, *others) = [saved[f"base_model.model.{own}"] for own in group]
        assert all(torch.equal(first, other) for other in others)
    base = hf.AutoModelForObjectDetection.from_pretrained(tmp_path / "base")
    again = load_adapter(base, tmp_path / "adapter", is_trainable=True)
    assert_same(boxes(again), expected)
    step(again, steps=1)
    for group in groups:
        names = {f"base_model.model.{own}" for own in group}
        state = {
            n.replace("modules_to_save.default.", ""): t for n, t in again.state_dict().items()
        }
        (first, *others) = [state[own] for own in sorted(names)]
        assert all(torch.equal(first, other) for other in others)
    probe = {"pixel_values": batch()["pixel_values"]}
    merge(adapted, tmp_path / "merged", dtype="base", probe=probe)
    merged = hf.AutoModelForObjectDetection.from_pretrained(tmp_path / "merged")
    assert_same(boxes(merged), expected)
    assert tied(merged) == groups
    unloaded = adapted.merge_and_unload()
    assert tied(unloaded) == groups
    assert_same(boxes(unloaded), expected)


@pytest.mark.parametrize("name", detection.TIED)
def test_new_classes_have_new_heads_that_are_saved(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    model = load_base(tmp_path, auto_class="AutoModelForObjectDetection", num_labels=2)
    new = [n for n, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    assert new
    adapted = wrap(model, LoraConfig(r=2))
    saved = {plain(n) for n, p in adapted.named_parameters() if p.requires_grad}
    assert saved.issuperset(new)


class TwoNames(hf.BertPreTrainedModel):
    """A model that has one layer under two names."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = hf.BertModel(config, add_pooling_layer=False)
        self.tagger = nn.Linear(config.hidden_size, 2)
        self.second = nn.ModuleDict({"again": self.tagger})
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden = self.bert(input_ids).last_hidden_state
        return self.tagger(hidden) + 2 * self.second["again"](hidden)


def two_names(tmp_path):
    bert = task_model("bert tokens").bert
    bert.save_pretrained(tmp_path)
    return TwoNames.from_pretrained(tmp_path).eval()


def test_a_head_with_two_names_is_trained_as_one(tmp_path):
    model = two_names(tmp_path)
    assert find_heads(model).names == ["tagger", "second.again"]
    adapted = wrap(model, LoraConfig(r=2, target_modules=["query"]))
    ids = torch.randint(3, 96, (2, 5))
    before = adapted(input_ids=ids)
    # The frozen originals and the trained copies.
    assert tied(adapted).count(["second.again.weight", "tagger.weight"]) == 2
    adapted(input_ids=ids).square().sum().backward()
    weights = [
        p for n, p in adapted.named_parameters() if n.endswith("default.weight") and "lora" not in n
    ]
    assert len(weights) == 1
    with torch.no_grad():
        weights[0] -= 0.1 * weights[0].grad
    after = adapted(input_ids=ids)
    assert not torch.allclose(before, after)
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(two_names(tmp_path / "bert"), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids), after)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids), after)
    assert merged.tagger.weight is merged.second["again"].weight


def test_an_adapter_under_one_of_two_names_is_refused(tmp_path):
    model = two_names(tmp_path)
    assert other_names(dict(model.named_modules())) == {"second.again": "tagger"}
    config = LoraConfig(r=2, target_modules=["query", "tagger"], modules_to_save=[])
    with pytest.raises(ContractError, match=r"tagger and second.again are one module.*deepcopy"):
        wrap(model, config)
    # PEFT alone adapts one of the two.
    stock = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["query", "tagger"]))
    assert type(stock.base_model.model.second["again"]) is nn.Linear


def test_copies_that_were_trained_apart_are_loaded_as_they_are(tmp_path):
    # Such adapters are PEFT's own.
    name = "deformable refining"
    adapted = wrap(build(name), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    key = "base_model.model.bbox_embed.0.layers.2.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    again = load_adapter(build(name), tmp_path)
    state = {n.replace("modules_to_save.default.", ""): t for n, t in again.state_dict().items()}
    assert torch.equal(state[key], tensors[key])
    other = key.replace("bbox_embed", "model.decoder.bbox_embed", 1)
    assert torch.equal(state[other], tensors[other])


def masked(**options):
    """A BERT with a language modelling head that is tied to its embeddings, and an adapter on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.BertForMaskedLM(task_model("bert tokens").config).eval()
    return wrap(
        model, LoraConfig(r=2, target_modules=["query"], ensure_weight_tying=True, **options)
    )


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
def test_ties_that_peft_does_not_keep_are_refused_or_kept():
    gpt2 = LoraConfig(r=2, target_modules=["wte", "lm_head"], ensure_weight_tying=True)
    assert wrap(models.tiny("gpt2"), gpt2)
    for saved in (["word_embeddings"], ["cls"]):
        with pytest.raises(
            ContractError, match=r"list all of them in modules_to_save \(bert.emb.*, cls.pred"
        ):
            masked(modules_to_save=saved)
    model = masked(modules_to_save=["word_embeddings", "cls"])
    ids = torch.randint(3, 96, (2, 5))
    model(input_ids=ids).logits.square().sum().backward()
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.shape == (96, 32) and parameter.requires_grad
    ]
    assert len(weights) == 1
    with torch.no_grad():
        weights[0] -= 0.01 * weights[0].grad.sign()
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
