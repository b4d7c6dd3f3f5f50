"""Run one case in one role: stock PEFT, fused, or stock PEFT in float64."""

import copy
import pickle
import tempfile
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from causal import AllDouble
from fuzz import build, calls, counting, threads, touches
from fuzz.build import Case, Unbuildable
from torch import Tensor, nn

import peftkit

ROLES = ("stock", "fused", "exact", "nudged")
"""Stock PEFT; ours; stock PEFT in float64 with the same values; the same with every weight changed by one rounding."""


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        values: Loss, logits and gradients by name.
        error: Type and first line of what was raised, or ``None``.
        stage: What was being done when it was raised.
        ran: Calls by module and op; of the fused run only.
        seen: Names of the modules that were called; of the stock run only.
        report: ``explain`` in the mode of the run; of the fused run only.
        traces: What of ours is left on a model that ought to be free of it.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None
    stage: str = "build"
    ran: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    report: Any = None
    traces: list[str] = field(default_factory=list)


def run(case: Case, role: str) -> Outcome:
    """Run a case.

    Raises:
        Unbuildable: The case describes nothing that can run.
    """
    outcome = Outcome()
    wide = role in ("exact", "nudged") or case.get("dtype", "float64") == "float64"
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undo.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(case["seed"])
        base = build.base_model(
            case
        )  # before the mode that widens every cast, as it is kept for the next role
        if wide:
            undo.enter_context(AllDouble())
        try:
            untouched = copy.deepcopy(base)
            model = _adapted(case, role, base, outcome, undo)
            outcome.stage = "run"
            _run(case, role, model, untouched, outcome)
        except Unbuildable:
            raise
        except Exception as error:  # compared with what the other role raises
            outcome.error = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return outcome


def _adapted(case: Case, role: str, base: Any, outcome: Outcome, undo: ExitStack) -> Any:
    """The model with adapters around ``base``, in its final state."""
    untouched = copy.deepcopy(base)
    choose = build.chooser(case, "touch")
    if case.get("touch_first"):
        touches.touch(case["touch_first"], base, choose, undo)
    config = build.adapter_config(case, base)
    outcome.stage = "wrap"
    if role != "fused":
        model: Any = peft.get_peft_model(base, config)
    elif case.get("front") == "accelerate" or build.has_fresh_head(base):
        model = peftkit.accelerate(peft.get_peft_model(base, config))
    else:
        model = peftkit.wrap(base, config)
    if case.get("adapters") in ("second", "both", "switched", "deleted"):
        model.add_adapter("second", build.adapter_config(case, untouched, second=True))
    build.fill_adapters(model, case)
    outcome.stage = "copy"
    model = _copied(case, role, model)
    outcome.stage = "state"
    if role in ("exact", "nudged"):
        model = model.double()
    if role == "nudged":
        _nudge(model)
    model = _in_state(case, model)
    if case.get("touch"):
        outcome.stage = "touch"
        touches.touch(case["touch"], model, choose, undo)
    return model


def _copied(case: Case, role: str, model: Any) -> Any:
    """The model, or a copy made in one of the ways that users make them."""
    kind = case.get("copy")
    if kind == "deepcopy":
        return copy.deepcopy(model)
    if kind == "pickle":
        return pickle.loads(pickle.dumps(model))
    if kind == "restore" and role == "fused":
        return peftkit.accelerate(peftkit.restore(model))
    if kind == "save":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            base = build.base_model(case)
            if role == "fused":
                return peftkit.load_adapter(base, folder, is_trainable=True)
            return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    return model


def _nudge(model: nn.Module) -> None:
    """Change every parameter by at most one rounding."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        step = torch.randint(-1, 2, parameter.shape, generator=generator).double()
        parameter.data.mul_(1 + step * torch.finfo(torch.float64).eps)


def _in_state(case: Case, model: Any) -> Any:
    """Adapters merged, switched or removed, the mode, checkpointing."""
    adapters = case.get("adapters")
    if adapters in ("second", "switched"):
        model.set_adapter("second")
    elif adapters == "both":
        model.base_model.set_adapter(["default", "second"])
    elif adapters == "deleted":
        model.delete_adapter("second")
    elif adapters in ("merged", "unmerged"):
        model.merge_adapter()
        if adapters == "unmerged":
            model.unmerge_adapter()
    elif adapters == "unloaded":
        model = model.merge_and_unload()
    elif adapters == "removed":
        model = model.unload()
    model.train(case.get("train", False))
    if "checkpointing" in case:
        reentrant = case["checkpointing"] == "reentrant"
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not getattr(base, "supports_gradient_checkpointing", False):
            raise Unbuildable("the model has no gradient checkpointing")
        model.train()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
    return model


@contextmanager
def contexts(case: Case, role: str, model: Any) -> Any:
    """What the forwards run under."""
    with ExitStack() as stack:
        if case.get("grad") == "none":
            stack.enter_context(torch.no_grad())
        elif case.get("grad") == "inference":
            stack.enter_context(torch.inference_mode())
        if case.get("autocast") and role not in ("exact", "nudged"):
            stack.enter_context(torch.autocast("cpu", dtype=build.DTYPES[case["autocast"]]))
        if case.get("adapters") == "disabled":
            stack.enter_context(model.disable_adapter())
        yield


def _run(case: Case, role: str, model: Any, base: Any, outcome: Outcome) -> None:
    count = counting.counted(model) if role == "fused" else nullcontext(Counter())
    watch = counting.called(model) if role == "stock" else nullcontext(set())
    with count as outcome.ran, watch as outcome.seen, contexts(case, role, model):
        if role == "fused":
            outcome.stage = "explain"
            outcome.report = peftkit.explain(model)
        outcome.stage = "run"
        if case.get("threads"):
            outcome.values = _threaded(case, role, model, base)
        else:
            outcome.values = calls.perform(case, role, model, base)
    if role == "fused" and case.get("adapters") in ("unloaded", "removed"):
        outcome.traces = traces(model)


def _threaded(case: Case, role: str, model: Any, base: Any) -> dict[str, Tensor]:
    """The losses of two threads that share the model; of other roles than fused one after the other."""
    values: dict[str, Tensor] = {}
    is_wide = case.get("dtype", "float64") == "float64"

    def work(number: int) -> None:
        # a thread starts without the modes of the one that made it
        with AllDouble() if is_wide else nullcontext(), contexts(case, role, model):
            losses = [
                calls.loss_of(case, role, model, base, number).detach()
                for _ in range(threads.ROUNDS)
            ]
        values[f"thread {number}"] = torch.stack(losses)

    if role == "fused":
        threads.in_two_threads(work, case["seed"])
    else:
        work(0)
        work(1)
    return values


def traces(model: nn.Module) -> list[str]:
    """Names of modules that still have a class, hook or attribute of ours."""
    left = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        ours = any(cls.__module__.startswith("peftkit") for cls in type(module).__mro__)
        ours |= any(getattr(hook, "__module__", "").startswith("peftkit") for hook in hooks)
        ours |= any(key.startswith("_peftkit") for key in vars(module))
        if ours:
            left.append(name)
    return left
