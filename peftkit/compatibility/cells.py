"""The cells of the compatibility table: each tests one task with one method on one tiny model."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit.checks import check
from peftkit.checks.reach import loss_of
from peftkit.compatibility.batches import training_batch
from peftkit.compatibility.methods import METHODS
from peftkit.compatibility.rounding import same_up_to_rounding
from peftkit.find.points import evaluating
from peftkit.loading import load_adapter
from peftkit.wrapping import restore, wrap

STEPS = 6
LEARNING_RATE = 0.02
NEW_TOKENS = 5
SHOWN = 300
"""Maximum number of characters of an unexpected error that are shown."""


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: The name that is shown.
        build: Builds the tiny model. Each call gives the same model, without dropout or other randomness in training mode.
    """

    name: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Outcome:
    """The result of one cell.

    Attributes:
        verdict: ``yes``; ``no``: refused with a reason; ``fails``: an unexpected error, or a wrong result; ``-``: the cell does
            not apply to this model.
        why: The reason; empty for ``yes``.
    """

    verdict: Literal["yes", "no", "fails", "-"]
    why: str = ""


class _Refused(Exception):
    """peftkit or another library refused a step with a reason, and the cell allows this."""


class _DoesNotApply(Exception):
    """The cell does not apply to the model."""


class _Wrong(Exception):
    """The cell ran, but the result is wrong."""


@contextlib.contextmanager
def _may_be_refused() -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise _Refused(str(error)) from error


def run_cells(case: Case, method: str, cells: list[str] | None = None) -> dict[str, Outcome]:
    """Try one method on one architecture.

    Args:
        case: The architecture.
        method: A key of ``METHODS``.
        cells: Keys of ``CELLS``. Default: all.

    Returns:
        The outcome of each cell. If the method is refused on this architecture, all cells have the same outcome.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = _outcome(lambda: _adapted(case.build(), method) and None)
        if refusal.verdict != "yes":
            return dict.fromkeys(cells or CELLS, refusal)
        return {
            name: _outcome(lambda name=name: CELLS[name](case, method)) for name in cells or CELLS
        }


def _outcome(cell: Callable[[], None]) -> Outcome:
    try:
        with torch.random.fork_rng(devices=[]):
            cell()
    except _DoesNotApply as reason:
        return Outcome("-", str(reason))
    except _Refused as reason:
        return Outcome("no", _sentence(reason))
    except _Wrong as reason:
        return Outcome("fails", str(reason))
    except Exception as error:  # a defect of any library is a result of the cell
        return Outcome("fails", shorten(f"{type(error).__name__}: {error}", SHOWN))
    return Outcome("yes")


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())


def _adapted(model: nn.Module, method: str, *, trained: bool = True) -> Any:
    """Add a new adapter to the model. With ``trained``, add noise to all of its weights, as if it had been trained."""
    torch.manual_seed(0)
    with _may_be_refused():
        adapted: Any = wrap(model, *METHODS[method](model))
    generator = torch.Generator().manual_seed(7)
    for parameter in adapted.parameters():
        if trained and parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise.to(parameter.dtype))
    return adapted


def _outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        output = model(**batch)
    return [t for t in output.values() if isinstance(t, Tensor) and t.is_floating_point()]


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Wrong(otherwise)


def train(case: Case, method: str) -> None:
    """The loss falls, every adapter tensor gets a gradient, and nothing else changes."""
    model = _adapted(case.build(), method, trained=False).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # keep the statistics of the base model
    batch = training_batch(model.get_base_model())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    _expect(losses[-1] < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")
    check(model, batch)
    after = dict(model.named_parameters())
    moved = [name for name, before in frozen.items() if not torch.equal(after[name], before)]
    _expect(not moved, f"{len(moved)} frozen tensors changed, such as {next(iter(moved), '')}")


def checkpointing(case: Case, method: str) -> None:
    """Gradients with checkpointing, reentrant or not, equal those without."""
    base: Any = case.build()
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise _DoesNotApply("transformers has no checkpointing for it")
    batch = training_batch(base)

    def gradients(mode: bool | None) -> dict[str, Tensor | None]:
        model = _adapted(case.build(), method).train()
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
            model.enable_input_require_grads()
        loss_of(model, batch).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients(None)
    # the gradient of a bias is a sum in which terms cancel, so its rounding errors are relative to other gradients
    scale = max(g.abs().max().item() for g in plain.values() if g is not None)
    for reentrant in (False, True):
        for name, gradient in gradients(reentrant).items():
            expected = plain[name]
            same = (
                gradient is expected
                if gradient is None or expected is None
                else same_up_to_rounding(gradient, expected, scale)
            )
            _expect(same, f"use_reentrant={reentrant}: the gradient of {name} differs")


def generate(case: Case, method: str) -> None:
    """Greedy generation gives the same tokens with a cache and without."""
    model = _adapted(case.build(), method).eval()
    base: Any = model.get_base_model()
    if not base.can_generate():
        raise _DoesNotApply("it does not generate")
    batch = training_batch(base)
    inputs = {name: batch[name] for name in batch if name not in ("labels", "attention_mask")}
    if "attention_mask" in batch:  # generation needs the padding on the left
        inputs["attention_mask"] = batch["attention_mask"].flip(-1)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    settings["eos_token_id"] = None
    cached = model.generate(**inputs, **settings, use_cache=True)
    _expect(cached.shape[-1] > 1, "nothing was generated")
    same = torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    _expect(same, "tokens with a cache and without differ")


def save(case: Case, method: str) -> None:
    """A saved and loaded adapter has the same tensors, bit for bit, and the same outputs up to rounding."""
    from peft import get_peft_model_state_dict

    model = restore(_adapted(case.build(), method))
    batch = training_batch(model.get_base_model())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_adapter(case.build(), folder, accelerate=False)
    before = get_peft_model_state_dict(model, save_embedding_layers=False)
    after = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    _expect(before.keys() == after.keys(), "the loaded adapter has other keys")
    odd = [key for key in before if not torch.equal(before[key], after[key])]
    _expect(not odd, f"{len(odd)} loaded tensors differ, such as {next(iter(odd), '')}")
    # the rounding of a matrix product can depend on the memory addresses of its operands
    pairs = zip(_outputs(loaded, batch), _outputs(model, batch), strict=True)
    _expect(all(same_up_to_rounding(a, b) for a, b in pairs), "the outputs differ")


def merge(case: Case, method: str) -> None:
    """The merged model has the outputs of the adapted model. Compared in float64, so that rounding hides no error."""
    base: Any = case.build().double()
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # torch's grouped product does not support float64
    batch = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in training_batch(base).items()
    }
    model = _adapted(base, method).double()
    expected = _outputs(model, batch)
    with _may_be_refused():
        merged = model.merge_and_unload()
    for actual, wanted in zip(_outputs(merged, batch), expected, strict=True):
        # Half of the digits have to agree. Rounding errors are far smaller than this limit, and a missing or doubled part is
        # far larger. transformers computes the loss in float32.
        limit = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max()
        _expect(bool((actual - wanted).abs().max() <= limit), "the outputs differ")


def four_bit(case: Case, method: str) -> None:
    """On a base model with NF4 linear layers, the loss is finite and every adapter tensor gets a gradient."""
    with _may_be_refused():
        import bitsandbytes  # noqa: F401 - if it is not installed, the cell is refused
    base = case.build()
    if not any(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in base.modules()):
        raise _DoesNotApply("it has no linear layers")
    model = _adapted(_quantised(base), method).train()
    check(model, training_batch(model.get_base_model()))


def _quantised(base: Any) -> nn.Module:
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model = type(base).from_pretrained(
            folder, quantization_config=settings, dtype=torch.float32
        )
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise _DoesNotApply("bitsandbytes quantises none of its layers")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


CELLS: dict[str, Callable[[Case, str], None]] = {
    "train": train,
    "checkpointing": checkpointing,
    "generate": generate,
    "save, load": save,
    "merge": merge,
    "4-bit": four_bit,
}
"""The cells by name. Each raises an error if the result is wrong."""
