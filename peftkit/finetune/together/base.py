"""The frozen model of several runs: loaded once, or several models with different heads on one backbone."""

from __future__ import annotations

from typing import Any

import torch

from peftkit.errors import ContractError, count, listing
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.setup import load_base_model

_WAY_OUT = "train the adapters separately"


class SharedBase:
    """Loads the model of each run, with the frozen weights of the first."""

    def __init__(self) -> None:
        self._models: dict[Any, tuple[Any, Any]] = {}

    def load(self, recipe: Recipe, task: Any, train: Any) -> Any:
        """The model with the head of a task.

        Runs with the same class of model, classes and seed share the whole model. Otherwise the model of the run is loaded too, and its
        backbone is replaced by that of the first, so that it needs memory until then.

        Raises:
            ContractError: The model cannot be loaded, or its backbone is not that of the first.
        """
        key = (task.auto_class, repr(task.model_arguments()), recipe.training.seed)
        if key in self._models:
            model, state = self._models[key]
            # Loading draws the values of a new head, so a run alone begins its adapter with later numbers.
            _set_random_state(state)
            return model
        model = load_base_model(recipe, task, train)
        state = _random_state()
        if self._models:
            first, _ = next(iter(self._models.values()))
            _share_backbone(first, model)
        self._models[key] = model, state
        return model


def _share_backbone(first: Any, model: Any) -> None:
    """Replace the backbone of a model by that of another, which must have the same weights.

    Raises:
        ContractError: They have no backbones, or these differ.
    """
    prefix = type(model).base_model_prefix
    own, shared = getattr(model, prefix, None), getattr(first, type(first).base_model_prefix, None)
    names = f"{type(first).__name__} and {type(model).__name__}"
    if own is None or shared is None or type(own) is not type(shared):
        raise ContractError(
            f"{names} have no backbone of one class ({type(shared).__name__}, {type(own).__name__}), so their adapters cannot be trained "
            f"together; {_WAY_OUT}"
        )
    ours, theirs = own.state_dict(), shared.state_dict()
    differ = sorted(ours.keys() ^ theirs.keys()) or [
        name for name, tensor in ours.items() if not _same(tensor, theirs[name])
    ]
    if differ:
        raise ContractError(
            f"the backbones of {names} differ in {count(len(differ), 'weight')}, which the checkpoint does not have for both:\n"
            f"{listing(differ)}\n{_WAY_OUT}."
        )
    setattr(model, prefix, shared)
    # An output head that shares the weight of the embeddings must share that of the backbone it has now.
    model.tie_weights()


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one == other
    return one.shape == other.shape and one.dtype is other.dtype and torch.equal(one, other)


def _random_state() -> Any:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.random.get_rng_state(), gpus


def _set_random_state(state: Any) -> None:
    torch.random.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
