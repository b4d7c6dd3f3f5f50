"""Measures of how much of an adapter's effect a merged model keeps.

Four functions are compared on the same inputs, in float32 arithmetic: ``base`` and ``tuned`` (the base model without and with the adapter),
``merged`` (the files that were written) and ``rounded`` (the base model without the adapter, rounded to the dtype of the files; it equals
``base`` if nothing had to be rounded). The *effect* is ``tuned - base``, and what is left of it is ``merged - rounded``.

``recovery = 1 - ‖(merged - rounded) - (tuned - base)‖² / ‖tuned - base‖²`` is the share of the effect's energy that the merge explains, the
R² of statistics. It is 1 for an exact merge and 0 for a merge that returns the base model, and it is negative if the merge does more harm
than good. Lost effect and added noise both reduce it. A relative error of 10 % of the effect is a recovery of 0.99. The ``projection``
alone, the factor with which the effect is still present, would hide noise: it can be 1 for a useless model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Comparison of a merged model's outputs with those of the base model with its adapter.

    Logits of language models are compared after their mean over the vocabulary was subtracted, because a constant changes no probability.

    Attributes:
        recovery: The share of the adapter's effect that was kept, see the module's docstring. ``None`` if there is no effect.
        projection: The factor with which the effect is still present: 1 for an exact merge.
        error_to_effect: Norm of the error relative to the norm of the effect; ``recovery = 1 - error_to_effect²``.
        effect: Norm of the effect relative to the norm of the tuned model's outputs.
        max_abs: Largest absolute difference between merged and tuned.
        relative: Norm of the difference between merged and tuned, relative to the norm of tuned. Includes the rounding of the base.
        kl: For language models: mean Kullback-Leibler divergence of merged from tuned over the positions, in nats.
        kl_base: The same for the base model instead of the merged one.
        top_token: For language models: share of positions at which merged and tuned have the same most probable token.
    """

    recovery: float | None
    projection: float | None
    error_to_effect: float | None
    effect: float
    max_abs: float
    relative: float
    kl: float | None = None
    kl_base: float | None = None
    top_token: float | None = None


@dataclass(frozen=True)
class LayerDifference:
    """Comparison of one merged layer with the adapted layer.

    Attributes:
        name: The layer's name in the base model.
        method: PEFT's class, such as ``lora.Linear``.
        stored: How the merged weight is stored: a dtype, ``nf4`` or ``int8``.
        weight_error: Norm of the stored minus the exact merged weight, relative to the exact one.
        weight_change: Norm of the exact merged minus the base weight, relative to the exact merged one. ``None`` for a trained head.
        output_error: Norm of the error of the layer's output on the probe, relative to that of the output. ``None`` if the layer did not
            run.
        recovery: As ``Difference.recovery``, for the layer's output.
    """

    name: str
    method: str
    stored: str
    weight_error: float
    weight_change: float | None
    output_error: float | None = None
    recovery: float | None = None


@dataclass(frozen=True)
class Certificate:
    """What a merge has written and how near it is to the adapted model. ``merge.json`` has the same content.

    Attributes:
        recovery: The share of the adapter's effect on the model's outputs that was kept; see ``Difference.recovery``.
        min_recovery: The threshold, or ``None``.
        accepted: Whether the recovery reaches the threshold.
        outputs: The comparison of the whole models.
        layers: The comparisons of the layers.
        facts: What was merged: adapters, base, dtype, rounding, probe, notes, versions.
    """

    recovery: float | None
    min_recovery: float | None
    accepted: bool
    outputs: Difference
    layers: tuple[LayerDifference, ...]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as data for JSON."""
        return {
            "recovery": self.recovery,
            "min_recovery": self.min_recovery,
            "accepted": self.accepted,
            "definition": "recovery = 1 - |(merged - rounded base) - (tuned - base)|^2 / |tuned - base|^2, on the outputs of the probe "
            "in float32 arithmetic; merged is read from the written files",
            **self.facts,
            "outputs": asdict(self.outputs),
            "layers": [asdict(layer) for layer in self.layers],
        }


def compare(
    base: Outputs, tuned: Outputs, merged: Outputs, rounded: Outputs, language_model: bool
) -> Difference:
    """Compare outputs of the four models by the formulas of this module. All have the same names and shapes."""
    effect2 = error2 = along = tuned2 = difference2 = 0.0
    max_abs = 0.0
    for name in tuned:
        b, t, m, r = (_centred(o[name], language_model) for o in (base, tuned, merged, rounded))
        effect, kept = t - b, m - r
        effect2 += _sum(effect, effect)
        error2 += _sum(kept - effect, kept - effect)
        along += _sum(kept, effect)
        tuned2 += _sum(t, t)
        difference2 += _sum(m - t, m - t)
        max_abs = max(max_abs, (m - t).abs().max().item())
    noticed = effect2 > 0
    kl, kl_base, top = _of_tokens(base, tuned, merged) if language_model else (None, None, None)
    return Difference(
        recovery=1 - error2 / effect2 if noticed else None,
        projection=along / effect2 if noticed else None,
        error_to_effect=(error2 / effect2) ** 0.5 if noticed else None,
        effect=_ratio(effect2, tuned2),
        max_abs=max_abs,
        relative=_ratio(difference2, tuned2),
        kl=kl,
        kl_base=kl_base,
        top_token=top,
    )


def recovery_of(base: Tensor, exact: Tensor, stored: Tensor) -> float | None:
    """``1 - ‖stored - exact‖² / ‖exact - base‖²``, or ``None`` if the denominator is zero."""
    effect = _sum(exact - base, exact - base)
    return 1 - _sum(stored - exact, stored - exact) / effect if effect > 0 else None


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``‖value - truth‖ / ‖truth‖``; zero if both are zero."""
    return _ratio(_sum(value - truth, value - truth), _sum(truth, truth))


def _of_tokens(base: Outputs, tuned: Outputs, merged: Outputs) -> tuple[float, float, float]:
    """Divergences of merged and base from tuned, and the share of equal most probable tokens, over all positions."""
    kl = kl_base = same = 0.0
    positions = 0
    for name in tuned:
        # row by row, because log-probabilities need as much memory as the logits
        for b, t, m in zip(base[name], tuned[name], merged[name], strict=True):
            truth = t.double().log_softmax(-1)
            p = truth.exp()
            kl += (p * (truth - m.double().log_softmax(-1))).sum().item()
            kl_base += (p * (truth - b.double().log_softmax(-1))).sum().item()
            same += (t.argmax(-1) == m.argmax(-1)).double().sum().item()
            positions += t[..., 0].numel()
    return kl / positions, kl_base / positions, same / positions


def _centred(value: Tensor, language_model: bool) -> Tensor:
    return value - value.mean(-1, keepdim=True) if language_model else value


def _sum(a: Tensor, b: Tensor) -> float:
    return torch.sum(a * b, dtype=torch.float64).item()


def _ratio(part2: float, whole2: float) -> float:
    if whole2 > 0:
        return (part2 / whole2) ** 0.5
    return 0.0 if part2 == 0 else float("inf")
