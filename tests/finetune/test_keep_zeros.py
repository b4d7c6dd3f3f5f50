"""A pruned model is tuned on with its zeros: no optimiser, weight decay or resumed run fills them."""

import finetune_cases as cases
import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit import ContractError
from peftkit.finetune import train
from peftkit.finetune.zeros import KeptZeros

FULL = {"name": "full", "keep_zeros": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and the same with zeros in half of its inner weights."""
    folder = tmp_path_factory.mktemp("models")
    model = cases.save_model(folder / "m", "llama", chat=True)
    peftkit.prune(model, folder / "p", pattern="2:4")
    return model, folder / "p"


def values(folder, tmp_path, out, strategy=FULL, **training):
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(16))
    settings = {"max_steps": 4, "samples": 0, "weight_decay": 0.1, "checkpoint_every": 2}
    return cases.recipe(
        folder, "sft", rows, tmp_path / out, strategy=strategy, training=settings | training
    )


def weights(folder):
    (file,) = folder.glob("model/*model.safetensors")
    return load_file(file)


def zeros_of(tensors):
    return {name: t == 0 for name, t in tensors.items() if "proj" in name}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_zeros_stay_and_all_other_weights_are_trained(optimizer, folders, tmp_path, one_thread):
    result = train(values(folders[1], tmp_path, "run", optimizer=optimizer, lr=1e-2))
    assert result.problems == []
    assert any("zeros kept, 50.0% of 14 weights" in note for note in result.notes)
    before, after = load_file(folders[1] / "model.safetensors"), weights(result.folder)
    was, now = zeros_of(before), zeros_of(after)
    assert [name for name in was if not was[name].equal(now[name])] == []
    moved = [(after[n] - before[n])[~was[n]].count_nonzero() / (~was[n]).sum() for n in was]
    assert min(moved) > 0.5


def test_without_the_option_zeros_are_filled(folders, tmp_path, one_thread):
    result = train(values(folders[1], tmp_path, "run", strategy="full", lr=1e-2))
    assert not any(mask.any() for mask in zeros_of(weights(result.folder)).values())


def test_only_the_trained_part_is_masked(folders, tmp_path, one_thread):
    partial = {"name": "partial", "last_blocks": 1, "keep_zeros": True}
    result = train(values(folders[1], tmp_path, "run", strategy=partial, lr=1e-2))
    assert any("50.0% of 7 weights" in note for note in result.notes)
    now = zeros_of(weights(result.folder))
    assert all(mask.float().mean() == 0.5 for mask in now.values())


def test_a_resumed_run_equals_an_uninterrupted_one(folders, tmp_path, one_thread):
    train(values(folders[1], tmp_path, "whole", lr=1e-2))
    parts = values(folders[1], tmp_path, "parts", lr=1e-2)
    train(parts, "training.stop_after=3")
    train(parts, "resume=true")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_the_gradient_is_masked_before_its_norm_is_taken(folders, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    model.config = None
    model[0].weight.data[0] = 0
    zeros = KeptZeros(model)
    model(torch.ones(5, 4)).sum().backward()
    assert not model[0].weight.grad[0].any()
    assert [name for name, _, _ in zeros.masks] == ["0.weight"]
    # An optimiser that ignores gradients fills them, unless they are set again after its step.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zeros.hold(optimizer)
    model[0].weight.grad.fill_(1.0)
    optimizer.step()
    assert not model[0].weight[0].any()
    with torch.no_grad():
        model[0].weight[0, 0] = 1
    assert "1 weight lost zeros, such as 0.weight" in zeros.judge()[0][0]


def test_a_model_without_zeros_is_refused(folders, tmp_path):
    with pytest.raises(ContractError, match=r"strategy\.keep_zeros=true, but no trained weight of"):
        train(values(folders[0], tmp_path, "run"))
    assert not (tmp_path / "run").exists()
