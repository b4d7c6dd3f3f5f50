"""Exact recognition: which module computes a formula that has a fused form.

The method: the module's own forward is traced into an aten graph (``trace``), the graph is brought to a canonical form (``graph``)
and compared with the graph of each known formula (``norm``, ``mlp``). Both are the same or they are not: there is no tolerance that
a wrong formula could pass, and every constant is compared as the Python number that the forward computed with. It is traced in
float32, bfloat16, float16 and float64, because in some dtypes a cast is no operation; in all of them the formula must be the same
one, so the order of casts is part of it. Values of weights do not matter, since the trace runs on stand-ins.

Why not compare outputs: two formulas can differ less than rounding in the dtype and at the inputs that are tried (an offset with a
large weight, a mean near zero, a factor of 1.001, a limit that is not reached).

A verdict holds for the class with the settings that the forward read. ``peftkit.fuse.seal`` checks in each forward that all of
this is as it was. A gated MLP::

    seal = seal_gated_mlp(module, names)     # microseconds after the first of its kind
    if isinstance(seal.answer, Reason): ...  # not fused, and why
    ...
    reason = seal.broken(module)             # in each forward: None or what changed

A seal keeps no module and no tensor: a copied model shares it, and a pickled seal recognises the module again when it is first
used. ``torch.compile`` cannot trace a seal: check ``is_transformed()`` before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise.mlp import seal_gated_mlp
from peftkit.fuse.recognise.norm import NormFormula, seal_norm

__all__ = [
    "NormFormula",
    "recognise_gated_mlp",
    "recognise_norm",
    "seal_gated_mlp",
    "seal_norm",
]


def recognise_norm(module: nn.Module) -> NormFormula | Reason:
    """The formula of a norm over the last axis, or why ``module`` computes none that has a fused form; never raises."""
    return seal_norm(module).answer


def recognise_gated_mlp(module: nn.Module, names: Sequence[str]) -> str | Reason:
    """The activation of a gated MLP (one of ``lora_swiglu_mlp.ACTIVATIONS``), or why ``module`` is none; never raises.

    Args:
        module: Any module.
        names: Its linears: gate, up and down, or the joint gate-and-up projection and down.
    """
    return seal_gated_mlp(module, names).answer
