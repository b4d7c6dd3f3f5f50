"""Whether the fused model did what stock PEFT does: values, errors, and what ``explain`` says."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz import counting
from fuzz.build import Case, Unbuildable
from fuzz.execute import Outcome, run
from fuzz.options import CAUSAL
from torch import Tensor

DRAWS = 6
"""With how many other values a case is tried again before a difference in few bits counts as a fault."""

REFUSED = {
    "shares its weight with": "PEFT adapts one of two tied weights and leaves the other behind",
    "these logits were not computed in the forward": "logits read after the head has changed",
    "is larger than both sides of every weight": "a rank that no weight can use",
    "as the experts of this architecture": "names that PEFT rewrites into other modules",
    "because modules_to_save has": "a module that is both adapted and trained in full",
    "the gradient of the logits was requested": "the gradient of logits that were never formed",
}
"""Words of the errors with which peftkit refuses on purpose, and what it refuses."""

Run = Callable[[Case, str], Outcome]


@dataclass(frozen=True)
class Finding:
    """One disagreement.

    Attributes:
        kind: ``"values"``, ``"names"``, ``"error"``, ``"report"`` or ``"trace left"``.
        what: The value's name, or a sentence.
        stock: What stock PEFT gave, as text.
        fused: What the fused model gave, as text.
        size: Of values: how far the fused model's is off, relative to its size.
    """

    kind: str
    what: str
    stock: str = ""
    fused: str = ""
    size: float = 0.0

    def __str__(self) -> str:
        """One line."""
        return f"{self.kind}: {self.what}; stock PEFT {self.stock}; fused {self.fused}"


def examine(case: Case, execute: Run = run) -> Finding | None:
    """The first disagreement of a case, or ``None``.

    Raises:
        Unbuildable: The case says nothing.
    """
    stock = execute(case, "stock")
    fused = execute(case, "fused")
    if stock.error or fused.error:
        return _errors(stock, fused)
    finding = _report(case, stock, fused)
    if finding is None and fused.traces:
        finding = Finding("trace left", ", ".join(fused.traces[:3]))
    if finding is not None or is_random(case):
        return finding
    if stock.values.keys() != fused.values.keys():
        if case.get("targets") == "all-linear" or case.get("exclude"):
            raise Unbuildable("peftkit's all-linear leaves out more than PEFT's")
        missing = sorted(stock.values.keys() ^ fused.values.keys())
        return Finding("names", ", ".join(missing[:3]), *_counts(stock, fused))
    return _values(case, stock, fused, execute)


def is_random(case: Case) -> bool:
    """Whether a forward draws random numbers, so that two models cannot give the same values."""
    drops = [v for k, v in case.items() if "drop" in k and isinstance(v, float)]
    return any(drops) and (case.get("train", False) or "checkpointing" in case)


def _counts(stock: Outcome, fused: Outcome) -> tuple[str, str]:
    return f"{len(stock.values)} values", f"{len(fused.values)} values"


def _errors(stock: Outcome, fused: Outcome) -> Finding | None:
    if stock.error:
        raise Unbuildable(f"stock PEFT raises {stock.error} ({stock.stage})")
    for words, why in REFUSED.items():
        if words in (fused.error or ""):
            raise Unbuildable(f"refused: {why}")
    return Finding("error", f"while it should {fused.stage}", "returns", f"raises {fused.error}")


def _report(case: Case, stock: Outcome, fused: Outcome) -> Finding | None:
    special = case.get("call", "plain") != "plain" or case.get("threads")
    if special or case.get("adapters") == "switched" or case.get("steps"):
        return None  # several states, or transformed: one report does not describe them
    adapted = case.get("adapters") not in ("unloaded", "removed")
    seen = stock.seen if adapted else set()  # without adapters there is nothing to report
    wrong = counting.disagreements(fused.report, fused.ran, seen)
    if case.get("length", 8) < 32 or case["family"] not in CAUSAL:
        # transformers' own attention runs for few queries; only text has as many as the case says
        wrong = [sentence for sentence in wrong if not sentence.startswith("attention")]
    labelled = case.get("labels") != "none"
    return Finding("report", wrong[0]) if wrong else _loss_report(fused, labelled)


def _loss_report(fused: Outcome, labelled: bool) -> Finding | None:
    sentence = counting.loss_disagreement(fused.report, fused.ran, labelled)
    return Finding("report", sentence) if sentence else None


def _values(case: Case, stock: Outcome, fused: Outcome, execute: Run) -> Finding | None:
    """Compare values; what is suspicious is tried with other values too, as a single one may be lucky."""
    suspects = _suspects(case, stock, fused, execute)
    if not suspects or case.get("dtype", "float64") == "float64" or case.get("threads"):
        return next(iter(suspects.values()), None)
    squares: dict[str, list[tuple[float, float, float]]] = {}
    for draw in range(DRAWS):
        again = case | {"seed": case["seed"] + 1000003 * draw}
        exact = execute(again, "exact")
        pair = (stock, fused) if draw == 0 else (execute(again, "stock"), execute(again, "fused"))
        for name in suspects.keys() & exact.values.keys():
            if all(name in outcome.values for outcome in pair):
                squares.setdefault(name, []).append(
                    _errors_of(name, *(outcome.values[name] for outcome in pair), exact.values)
                )
    for name, finding in suspects.items():
        if name not in squares:
            return finding
        draws = torch.tensor(squares[name])
        allowed, error, rounding = draws.square().mean(0).sqrt().tolist()
        # a saturated softmax makes one draw of many wild, in both models alike
        often = (draws[:, 1] > 4 * draws[:, 0] + draws[:, 2]).double().mean().item() > 0.5
        if often and error > 4 * allowed + rounding and 4 * allowed < 1:
            return finding  # else stock PEFT gives little more than rounding errors
    return None


def _suspects(case: Case, stock: Outcome, fused: Outcome, execute: Run) -> dict[str, Finding]:
    found = {}
    is_wide = case.get("dtype", "float64") == "float64" and not case.get("autocast")
    exact = execute(case, "nudged" if is_wide else "exact")
    if exact.error:
        raise Unbuildable(f"stock PEFT in float64 raises {exact.error}")
    for name, value in stock.values.items():
        own = fused.values[name]
        if own.dtype != value.dtype or own.shape != value.shape:
            found[name] = Finding(
                "values",
                name,
                f"{value.dtype} {list(value.shape)}",
                f"{own.dtype} {list(own.shape)}",
            )
        elif _same_where_not_finite(name, value, own):
            reference = exact.values[name].nan_to_num(0, 0, 0)
            size = _scale(name, exact.values)
            if is_wide:
                off = _norm(own - value)
                limit = 64 * _norm(reference - value.nan_to_num(0, 0, 0)) + 1024 * eps(value) * size
            else:
                allowed, off, rounding = _errors_of(name, value, own, exact.values)
                limit = 4 * allowed + rounding
            if off > limit:
                found[name] = _difference(name, value, own, off / (size or 1.0) if is_wide else off)
        else:
            found[name] = _difference(name, value, own, math.inf)
    return found


def _errors_of(
    name: str, stock: Tensor, fused: Tensor, exact: dict[str, Tensor]
) -> tuple[Any, ...]:
    """The distance of both from float64, and one rounding of the value's own dtype, relative to the value's size."""
    size = _scale(name, exact) or 1.0
    truth = exact[name].nan_to_num(0, 0, 0)
    off = [_norm(value.double() - truth) / size for value in (stock, fused)]
    return *off, eps(stock)


def _scale(name: str, exact: dict[str, Tensor]) -> float:
    """The size of a value, at least a millionth of all gradients together: some are zero but for rounding."""
    own = _norm(exact[name])
    if not name.startswith("grad "):
        return own
    together = sum(_norm(v) ** 2 for n, v in exact.items() if n.startswith("grad ")) ** 0.5
    return max(own, 1e-6 * together)


def _same_where_not_finite(name: str, a: Tensor, b: Tensor) -> bool:
    """Whether two values are finite in the same places; of a loss also whether they are both nan or both infinite."""
    if name.startswith("grad "):  # inf - inf depends on the order of a sum
        return bool((a.isfinite() == b.isfinite()).all())
    return bool((a.isnan() == b.isnan()).all() and (a.isinf() == b.isinf()).all())


def _norm(value: Tensor) -> float:
    return value.double().nan_to_num(0, 0, 0).norm().item()


def eps(value: Tensor) -> float:
    """The relative distance of two neighbouring numbers of the value's dtype."""
    return torch.finfo(value.dtype).eps


def _difference(name: str, stock: Tensor, fused: Tensor, size: float) -> Finding:
    if stock.numel() == 1:
        return Finding("values", name, f"{stock.item():.9g}", f"{fused.item():.9g}", size)
    shown = f"norm {_norm(fused):.6g}, {size:.2g} of its size off"
    return Finding("values", name, f"norm {_norm(stock):.6g}", shown, size)


def same_fault(a: Finding, b: Finding) -> bool:
    """Whether two findings of one case, before and after an option was left out, are probably one fault."""
    if a.kind != b.kind:
        return False
    if a.kind == "values":
        return a.size >= b.size / 20
    if a.kind == "error":
        return a.fused[:40] == b.fused[:40]
    return _without_names(a.what) == _without_names(b.what)


def _without_names(sentence: str) -> str:
    return re.sub(r"\S*\.\S*|[(].*", "", sentence)
