"""Exact recognition of modules that compute a formula with a fused form.

The module's own forward is traced into an aten graph (``trace``). The graph is brought to a canonical form (``graph``) and compared
with the graph of each known formula (``norm``, ``mlp``). The comparison is exact: there is no tolerance that a wrong formula could
pass, and every constant is compared as the Python number that the forward used. The forward is traced in float32, bfloat16, float16 and
float64, because in some dtypes a cast is no operation. The formula must be the same in all of them, so the order of casts is part
of it. The values of weights do not matter, because the trace runs on stand-ins.

Outputs are not compared, because two formulas can differ by less than rounding for some dtype and some inputs: an offset with a large
weight, a mean near zero, a factor of 1.001, or a limit that is not reached.

A result is valid for the class with the settings that the forward read. ``peftkit.fuse.seal`` checks in each forward that nothing of
this has changed. For a gated MLP::

    seal = seal_gated_mlp(module, names)     # microseconds after the first of its kind
    if isinstance(seal.answer, Reason): ...  # not fused, for this reason
    ...
    reason = seal.broken(module)             # in each forward: None, or what changed

A seal keeps no module and no tensor. A copied model shares the seal, and an unpickled seal recognises the module again at its first
use. ``torch.compile`` cannot trace a seal, so check ``is_transformed()`` before.
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
    """The formula of a norm over the last axis, or why ``module`` computes no formula with a fused form. Never raises."""
    return seal_norm(module).answer


def recognise_gated_mlp(module: nn.Module, names: Sequence[str]) -> str | Reason:
    """The activation of a gated MLP (one of ``lora_swiglu_mlp.ACTIVATIONS``), or why ``module`` is no such MLP. Never raises.

    Args:
        module: Any module.
        names: Its linears: gate, up and down, or the joint gate-and-up projection and down.
    """
    return seal_gated_mlp(module, names).answer
