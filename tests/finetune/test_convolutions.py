"""Convolutional image models: batch norms keep their statistics while they are frozen, and every strategy finds its way in them."""

import json

import finetune_cases as cases
import pytest
import torch
import vision_models
from finetune_processes import torchrun
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from peftkit import ContractError, LoraConfig, check, wrap
from peftkit.find.statistics import hold_statistics, norms_with_statistics
from peftkit.finetune import evaluate, train
from peftkit.finetune.blocks import Places, find_stacks
from peftkit.finetune.images import stored_image
from peftkit.finetune.strategies import AdapterSetting, require_strategy
from peftkit.finetune.trainer import RecipeTrainer

STEPS = {"max_steps": 8, "batch_size": 8, "lr": 1e-2, "head_lr": 1e-2, "checkpoint_every": 4}


def lora(name, **options):
    return {
        "name": "lora",
        "r": 4,
        "target_modules": vision_models.CONVOLUTIONS[name],
        **options,
    }


def recipe(tmp_path, name, strategy, **changes):
    model = vision_models.save(tmp_path / "m", name)
    data = cases.images(tmp_path / "i")
    changes = {"data": {"eval": 0.25}, "training": STEPS} | changes
    return cases.recipe(
        model, "image_classification", data, tmp_path / "run", strategy=strategy, **changes
    )


def statistics(folder):
    (file,) = folder.glob("*model.safetensors")
    return {n: t for n, t in load_file(file).items() if "running_" in n}


def logged(folder, name):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("name", vision_models.BUILDERS)
def test_a_loaded_adapter_computes_what_it_computed_in_training(name, tmp_path, one_thread):
    found = train(recipe(tmp_path, name, lora(name)))
    assert (found.status, found.problems) == ("finished", [])
    again = evaluate(tmp_path / "run")
    # One batch of the same images in the same process: the same numbers.
    assert again["loss"] == found.metrics["eval_loss"]
    assert again["accuracy"] == found.metrics["eval_accuracy"]


def test_statistics_that_change_without_being_saved_are_a_problem(
    tmp_path, one_thread, monkeypatch
):
    monkeypatch.setattr("peftkit.finetune.trainer.hold_statistics", lambda norms: None)
    found = train(recipe(tmp_path, "resnet", lora("resnet")))
    assert len(found.problems) == 1
    assert "running_mean" in found.problems[0]
    assert "the adapter's file does not contain" in found.problems[0]
    assert evaluate(tmp_path / "run")["loss"] != found.metrics["eval_loss"]


@pytest.mark.parametrize(
    ("strategy", "changed"),
    [
        ("full", lambda n: True),
        ({"name": "partial", "last_blocks": 1}, lambda n: ".stages.2." in n),
        ({"name": "partial"}, lambda n: False),
        ({"name": "partial", "biases": True}, lambda n: False),
        ({"name": "partial", "norms": True}, lambda n: True),
        ({"name": "gradual", "stage_steps": 6}, lambda n: ".stages.2." in n),
        ({"name": "probe_then_tune", "probe_steps": 6}, lambda n: False),
    ],
    ids=["full", "last block", "head", "biases", "norms", "first stage", "probe"],
)
def test_only_norms_that_are_trained_change_their_statistics(
    strategy, changed, tmp_path, one_thread
):
    values = recipe(tmp_path, "resnet", strategy)
    values["training"] |= {"stop_after": 3, "max_steps": 40}
    assert train(values).status == "stopped"
    before = statistics(tmp_path / "m")
    after = statistics(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    after = {name.removeprefix("resnet."): t for name, t in after.items()}
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if changed("." + n)
    }


def test_norms_without_weights_belong_to_their_parent():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    (norm,) = norms_with_statistics(model)
    assert norm.is_trained
    model[0].bias.requires_grad_(False)
    hold_statistics([norm])
    assert not model[1].training
    assert norms_with_statistics(nn.BatchNorm1d(4, track_running_stats=False)) == []


def test_check_notes_frozen_norms_that_change():
    model = wrap(vision_models.tiny("resnet"), LoraConfig(r=2, target_modules=["convolution"]))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    (note,) = check(model, batch).notes
    assert note.startswith(f"{len(norms)} frozen batch norms change their running statistics")
    hold_statistics(norms_with_statistics(model))
    assert check(model, batch).notes == ()
    assert all(map(torch.equal, before, [m.running_mean for m in norms]))


def test_resuming_keeps_the_statistics(tmp_path, one_thread):
    values = recipe(tmp_path, "resnet", {"name": "gradual", "stage_steps": 2})
    train(values)
    parts = values | {"out": str(tmp_path / "parts")}
    train(parts | {"training": values["training"] | {"stop_after": 5}})
    train(parts | {"resume": True})
    whole, again = (
        load_file(tmp_path / n / "model" / "model.safetensors") for n in ("run", "parts")
    )
    assert [n for n in whole if not torch.equal(whole[n], again[n])] == []


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_accumulated_batches_are_averaged(name, tmp_path, one_thread):
    norms = []
    for rows, batches in ((8, 1), (2, 4)):
        values = recipe(
            tmp_path,
            name,
            lora(name),
            data={},
            training={"max_steps": 1, "batch_size": rows, "gradient_accumulation": batches},
        )
        train(values | {"out": str(tmp_path / f"run {rows}")})
        norms += logged(tmp_path / f"run {rows}", "grad_norm")
        for folder in ("m", "i"):
            (tmp_path / folder).rename(tmp_path / f"{folder} {rows}")
    # The same eight images: only the order of the sums differs.
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.slow
def test_losses_of_two_processes_are_averaged(tmp_path, one_thread):
    """ResNet takes the number of labels as a keyword and does not divide its loss by it."""
    training = {"max_steps": 1, "batch_size": 8, "log_every": 1}
    values = recipe(tmp_path, "resnet", lora("resnet"), data={}, training=training)
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    torchrun("train", file, "training.batch_size=4", f"out={tmp_path / 'parts'}")
    for measure in ("loss", "grad_norm"):
        (whole,), (parts,) = (logged(tmp_path / run, measure) for run in ("run", "parts"))
        assert parts == pytest.approx(whole, rel=1e-4), measure


@pytest.mark.parametrize(("count", "accepts"), [(1, True), (2, False)])
def test_models_that_ignore_the_number_of_labels_are_found(
    count, accepts, tmp_path, monkeypatch, one_thread
):
    seen = []
    step, divides = RecipeTrainer.training_step, RecipeTrainer._model_divides_by_items

    def asked(self):
        with monkeypatch.context() as inside:
            inside.setattr("peftkit.finetune.trainer.process_count", lambda: count)
            return divides(self)

    def watched(self, *args, **kwargs):
        seen.append(self.model_accepts_loss_kwargs)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", watched)
    monkeypatch.setattr(RecipeTrainer, "_model_divides_by_items", asked)
    training = {"max_steps": 1, "batch_size": 4}
    train(recipe(tmp_path, "resnet", lora("resnet"), data={}, training=training))
    assert seen == [accepts]


@pytest.mark.parametrize("name", vision_models.BUILDERS)
@pytest.mark.parametrize("strategy", ["lora", "full", "partial", "gradual"])
def test_every_strategy_trains(name, strategy, tmp_path, one_thread):
    chosen = {
        "lora": lora(name),
        "full": "full",
        "partial": {"name": "partial", "last_blocks": 2},
        "gradual": {"name": "gradual", "blocks_per_stage": 4},
    }[strategy]
    values = recipe(tmp_path, name, chosen)
    values["training"] |= {"max_steps": 24, "batch_size": 9, "lr": 1e-3, "checkpoint_every": 24}
    found = train(values)
    assert (found.status, found.problems) == ("finished", [])
    if strategy in ("lora", "partial"):
        losses = logged(tmp_path / "run", "loss")
        assert sorted(losses[-6:])[2] < 0.5 * losses[0], losses
    else:
        # Random norms of many tiny blocks make these losses jump, but every weight must have moved.
        (changed,) = [note for note in found.notes if "trained tensors changed" in note]
        assert changed.split()[0] == changed.split()[2]


def test_blocks_of_convolutional_models():
    stacks = {
        name: [(s.name, s.size) for s in find_stacks(vision_models.tiny(name))]
        for name in vision_models.BUILDERS
    }
    assert stacks == {
        "resnet": [("resnet.encoder.stages", 3)],
        "efficientnet": [("efficientnet.encoder.blocks", 8)],
        "mobilenet": [("mobilenet_v2.layer", 16)],
        "regnet": [("regnet.encoder.stages", 3)],
        "convnext": [("convnext.encoder.stages", 4)],
    }
    places = Places(vision_models.tiny("mobilenet"))
    assert places.level("mobilenet_v2.conv_stem.first_conv.convolution.weight") == 0
    assert places.level("mobilenet_v2.conv_1x1.convolution.weight") == places.depth + 1


class Vgg(nn.Module):
    """Convolutions, activations and pooling in one list, as in VGG."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(8, 3)


def test_models_without_blocks_are_refused_with_a_way_out():
    def prepared(name, **options):
        strategy = require_strategy(name)
        return strategy.apply(Vgg(), strategy.options(options, "strategy"), AdapterSetting())

    with pytest.raises(
        ContractError, match=r"Vgg has no list of equal blocks.*pattern.*features, classifier"
    ):
        prepared("partial", last_blocks=1)
    with pytest.raises(
        ContractError, match=r"gradual needs .* and Vgg has none; use full, or part"
    ):
        prepared("gradual")
    names = prepared("partial", pattern=r"features\.2\.").model.named_parameters()
    assert [n for n, p in names if p.requires_grad] == ["features.2.weight", "features.2.bias"]


def test_lora_without_linear_layers_names_the_convolutions():
    with pytest.raises(ContractError, match=r"convolutions, target_modules=\['convolution'\]:"):
        wrap(vision_models.tiny("resnet"), LoraConfig(r=2))
    with pytest.raises(ContractError, match=r"target_modules=\['0.convolution', '3.convolution"):
        wrap(vision_models.tiny("regnet"), LoraConfig(r=2))


@pytest.mark.parametrize("name", vision_models.BUILDERS)
def test_one_step_equals_that_of_peft(name):
    from peft import get_peft_model

    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    results = []
    for make in (wrap, get_peft_model):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules=vision_models.CONVOLUTIONS[name], modules_to_save=["classifier"]
        )
        # PEFT's own layers have no stride, which MobileNet reads if it pads as TensorFlow does.
        options = {"tf_padding": False} if name == "mobilenet" else {}
        model = make(vision_models.tiny(name, **options), config).train()
        hold_statistics(norms_with_statistics(model))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.1)
        loss = model(**batch).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (loss, ours), (expected, theirs) = results
    assert ours.keys() == theirs.keys()
    assert any("lora_A" in n for n in ours)
    torch.testing.assert_close(loss, expected)
    for parameter_name in ours:
        torch.testing.assert_close(ours[parameter_name], theirs[parameter_name])


def test_images_of_pillow_data_sets_and_data_uris_are_read(tmp_path, one_thread):
    import datasets

    folder = cases.images(tmp_path / "i", 4)
    model = vision_models.save(tmp_path / "m", "convnext")
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    rows = [{"image": Image.open(file), "label": n} for file, n in zip(files, labels, strict=True)]
    table = datasets.Dataset.from_dict({"image": list(map(str, files)), "label": labels})
    uris = [{"image": stored_image(row["image"]), "label": row["label"]} for row in map(dict, rows)]
    losses = []
    for number, data in enumerate(
        (rows, table.cast_column("image", datasets.Image()), uris, str(folder))
    ):
        values = cases.recipe(model, "image_classification", data, tmp_path / str(number))
        losses.append(train(values).metrics["train_loss"])
    assert losses == [losses[-1]] * 4
    rows[5]["image"] = "data:image/png;base64,AAAA"
    with pytest.raises(ContractError, match=r"row 6: 'data:image.* is no image that can be read"):
        train(cases.recipe(model, "image_classification", rows, tmp_path / "bad"))
