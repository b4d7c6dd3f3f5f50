"""``initialise``: start a LoRA adapter from the base weights or from the error of their quantisation, one layer at a time."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.original import OriginalWeights
from peftkit.errors import ContractError, count, listing, short
from peftkit.inits.mark import FROM_WEIGHTS, is_marked, mark_residual
from peftkit.inits.parts import iterations_of, orthonormal_part, principal_part
from peftkit.inits.report import InitReport, LayerStart
from peftkit.inits.targets import Target, targets_of

logger = logging.getLogger(__name__)

_NOTHING_TO_FIT = "its weight is not quantised, so there is no error to fit"


def initialise(
    model: nn.Module,
    init: str,
    weights: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    *,
    iterations: int = 1,
) -> InitReport:
    """Start a new LoRA adapter from the base weights, on a base in NF4, int8, 16 or 32 bits.

    - ``"pissa"`` moves the principal part of each weight into ``A`` and ``B`` (exactly, or by ``"pissa_niter_N"`` with N power
      iterations), ``"olora"`` a part of its QR decomposition. The residual ``W - scale · B A`` replaces the base weight, quantised again
      in its storage. With ``weights`` the parts are those of the original weight, otherwise those of the decoded one.
    - ``"loftq"`` fits ``A`` and ``B`` to what the quantisation of the original weight has lost, and leaves the base as it is. With more than
      one iteration the base becomes the quantised ``W - scale · B A`` before each further fit.

    Unlike PEFT's ``replace_lora_weights_loftq``, which needs a GPU and 4 bits, ``A`` and ``B`` are divided by the adapter's scale, so that the
    result is right for every ``lora_alpha``. A changed base is only right together with this adapter. So the adapter's
    config then says ``init_lora_weights="residual:..."``; PEFT refuses to load it, and ``load_adapter`` checks that it has the same base.

    Only one layer is decoded at a time, on its own device.

    Args:
        model: A model with a new LoRA adapter, such as ``wrap(load_base(path, "nf4"), LoraConfig(r=16))``; changed in place.
        init: ``"pissa"``, ``"pissa_niter_N"``, ``"olora"`` or ``"loftq"``.
        weights: The folder or Hub id of the checkpoint that was quantised; its weights are read layer by layer. ``"loftq"`` needs it; without
            it the path from which the base was loaded is used.
        adapter_name: The adapter.
        iterations: Iterations of LoftQ.

    Returns:
        The errors of each layer before and after.

    Raises:
        ContractError: An argument is wrong, the adapter is not new, the weights do not belong to the base, or no layer can be initialised. If
            a layer fails after others were changed, the message says so.

    Source: Meng et al., 2024, arXiv:2404.02948 (PiSSA, QPiSSA); Li et al., 2023, arXiv:2310.08659 (LoftQ).
    """
    return Start(model, init, weights, adapter_name, iterations).run()


class Start:
    """A start that was checked as far as possible without reading or changing a weight; ``initialise`` has the arguments and errors."""

    def __init__(
        self, model: nn.Module, init: str, weights: Any, adapter_name: str, iterations: int
    ):
        self._model, self._init, self._iterations = model, init, iterations
        self._config = config = _config_of(model, adapter_name)
        _require_init(init, iterations)
        self._changes = init != "loftq" or iterations > 1
        self._found, self._left = targets_of(model, adapter_name, replaces_weights=self._changes)
        if is_marked(config):
            raise ContractError(
                f"adapter {adapter_name!r} was initialised before ({config.init_lora_weights!r}) and has changed the base; load the base "
                "again to start anew"
            )
        used = [name for name, target in self._found.items() if bool((target.B != 0).any())]
        if used:
            raise ContractError(
                f"adapter {adapter_name!r} is not new: lora_B of {count(len(used), 'layer')} is not zero ({used[0]}, ...), and initialise would "
                "replace what it has learned; add a new adapter with init_lora_weights=True"
            )
        if init == "loftq":
            dense = [name for name, target in self._found.items() if not target.weight.is_quantised]
            self._left |= dict.fromkeys(dense, _NOTHING_TO_FIT)
        self._targets = {name: t for name, t in self._found.items() if name not in self._left}
        if not self._targets:
            reasons = [f"{name}: {reason}" for name, reason in self._left.items()]
            raise ContractError(
                f"init={init!r}: no layer of adapter {adapter_name!r} can be initialised"
                + (f":\n{listing(reasons)}" if reasons else "")
            )
        self._original = _original(model, init, weights, self._targets)

    def run(self) -> InitReport:
        """Initialise the layers, one after the other."""
        init, original, config = self._init, self._original, self._config
        rows = _start_all(self._targets, init, original, self._iterations)
        for name in self._targets.keys() - {row.name for row in rows}:
            self._left[name] = "its weight was quantised without an error"
        if self._changes:
            name = init if original is None else f"{init}{FROM_WEIGHTS}"
            mark_residual(self._model, config, name, self._found)
        else:
            config.init_lora_weights, config.loftq_config = True, {}
        source = "the base as it was" if original is None else f"the weights of {original.path}"
        report = InitReport(init, source, self._changes, tuple(rows), self._left)
        logger.info("%s", report)
        return report


def _config_of(model: Any, adapter_name: str) -> Any:
    from peft import LoraConfig

    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict):
        raise ContractError(
            f"model is a {type(model).__name__} without adapters; call wrap(model, LoraConfig(...)) first"
        )
    if adapter_name not in configs:
        raise ContractError(
            f"adapter_name={adapter_name!r} is not in the model, which has {', '.join(map(repr, configs))}"
        )
    if not isinstance(configs[adapter_name], LoraConfig):
        raise ContractError(
            f"adapter {adapter_name!r} is a {type(configs[adapter_name]).__name__}; only LoRA starts from base weights"
        )
    return configs[adapter_name]


def _require_init(init: Any, iterations: Any) -> None:
    known = isinstance(init, str) and (init in ("pissa", "olora", "loftq") or iterations_of(init))
    if not known:
        raise ContractError(
            f"init={short(init)} is unknown; pass 'pissa', 'pissa_niter_4' (or another number from 1 on), 'olora' or 'loftq'"
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ContractError(f"iterations={iterations!r} must be a whole number of at least 1")
    if iterations != 1 and init != "loftq":
        raise ContractError(
            f"iterations={iterations} has no effect for init={init!r}; remove it (the iterations of a randomised PiSSA are part of its "
            "name: 'pissa_niter_4')"
        )


def _original(
    model: Any, init: str, weights: Any, targets: dict[str, Target]
) -> OriginalWeights | None:
    """The original weights; it is checked that there is one for each layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if weights is None:
        if init != "loftq":
            return None
        weights = getattr(base, "name_or_path", None)
        if not weights:
            raise ContractError(
                "init='loftq' needs the weights before they were quantised, and the base model does not say from where it was loaded; "
                "pass initialise(model, 'loftq', weights=FOLDER_OR_ID)"
            )
    found = OriginalWeights(weights, "weights", getattr(base, "base_model_prefix", ""))
    for name, target in targets.items():
        found.require(f"{name}.weight", target.stored_shape)
    return found


def _start_all(
    targets: dict[str, Target], init: str, original: OriginalWeights | None, iterations: int
) -> list[LayerStart]:
    rows = []
    for done, (name, target) in enumerate(targets.items()):
        try:
            with torch.no_grad():
                row = _start(name, target, init, original, iterations)
        except (ContractError, RuntimeError, OSError) as error:
            before = f"{count(done, 'layer')} of {len(targets)} were initialised before"
            way_out = f"{before}; load the base again" if done else "No layer was changed before"
            raise ContractError(f"{name} could not be initialised: {error}. {way_out}") from error
        if row is not None:
            rows.append(row)
    return rows


def _start(
    name: str, target: Target, init: str, original: OriginalWeights | None, iterations: int
) -> LayerStart | None:
    """Initialise one layer. ``None`` if there is nothing to fit."""
    decoded = W = target.weight.decoded()
    if original is not None:
        W = original(f"{name}.weight", target.stored_shape).to(W.device).float()
        W = W.T if target.weight.transposed else W
    norm = _norm(W)
    before = _norm(W - decoded)
    if norm and before >= norm:
        # zero is one of the levels, so rounding to the nearest level cannot do more
        raise ContractError(
            f"{original.path if original else 'the base'} has other weights than the base: they differ by {before / norm:.0%}"
        )
    if init == "loftq":
        if not before:
            return None
        _fit_error(target, W, decoded, iterations)
    else:
        if init == "olora":
            A, B = orthonormal_part(W, target.rank)
        else:
            A, B = principal_part(W, target.rank, target.scale, iterations_of(init))
        target.set_factors(A, B)
        target.weight.store(W - target.update())
    sum_ = target.weight.decoded() + target.update()
    target.set_magnitude(sum_)
    relative = (before / norm, _norm(W - sum_) / norm) if norm else (0.0, 0.0)
    return LayerStart(name, target.weight.storage, target.rank, *relative, norm)


def _fit_error(target: Target, W: Tensor, decoded: Tensor, iterations: int) -> None:
    """LoftQ, algorithm 1: quantise what the factors leave, and fit the factors to what the quantisation leaves."""
    for step in range(iterations):
        if step:
            target.weight.store(W - target.update())
            decoded = target.weight.decoded()
        target.set_factors(*principal_part(W - decoded, target.rank, target.scale, None))


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
