"""The configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig

from peftkit.find.values import (
    require_bool,
    require_factor,
    require_integer,
    require_integers,
    require_number,
)
from peftkit.peft_types import PeftkitType

DEFAULT_REDUCTION = 16.0


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters: ``h + scaling · up(act(down(h)))``. A new adapter does not change the base model's output.

    Source: Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2020, arXiv:2005.00247; He et al., 2021, arXiv:2110.04366.
    """

    bottleneck_size: int | None = None
    """Features between ``down`` and ``up``. Default: the width divided by ``reduction_factor``."""

    reduction_factor: float | None = None
    """width / bottleneck_size. Default: 16, if ``bottleneck_size`` is not given either."""

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """``houlsby``: on the outputs of attention and MLP. ``pfeiffer``: one at the end of each layer. In post-norm models it
    reads the output of the layer's last norm, and its part is added to the input of this norm. ``parallel``: beside the MLP,
    from the MLP's input to its output."""

    activation: str = "relu"
    """One of ``peftkit.bottleneck.module.ACTIVATIONS``."""

    scaling: float | Literal["learned"] = 1.0
    """Factor of the adapter's part. ``"learned"`` trains one number per adapter, which starts at 1."""

    layer_norm: bool = False
    """Add a LayerNorm before ``down``."""

    layers: list[int] | None = None
    """Indices of the layers that get adapters. Default: all layers."""

    target_modules: list[str] | str | None = None
    """Modules whose output is adapted. Default: the modules that ``placement`` selects."""

    exclude_modules: list[str] | str | None = None
    """Modules that get no adapter."""

    modules_to_save: list[str] | None = None
    """Modules that are trained and saved in full, such as a new head."""

    sources: dict[str, str] | None = None
    """For ``parallel``: the module whose input the adapter reads, by target module, if it is not the target itself. Set
    together with ``target_modules``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftkitType.PEFTKIT_BOTTLENECK
        if self.placement not in ("houlsby", "pfeiffer", "parallel"):
            raise ValueError(
                f"placement={self.placement!r} is unknown; use 'houlsby', 'pfeiffer' or 'parallel'"
            )
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError(
                f"bottleneck_size={self.bottleneck_size} and reduction_factor={self.reduction_factor} both set the size; give "
                "only one of them"
            )
        if self.bottleneck_size is not None:
            require_integer("bottleneck_size", self.bottleneck_size, 1)
        require_integers("layers", self.layers)
        require_bool("layer_norm", self.layer_norm)
        if self.scaling != "learned":
            if isinstance(self.scaling, str):
                raise ValueError(f"scaling={self.scaling!r}: use a number or 'learned'")
            require_factor("scaling", self.scaling)
        if self.reduction_factor is not None:
            require_number("reduction_factor", self.reduction_factor)
        if self.reduction_factor is not None and not self.reduction_factor > 0:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} is not above 0, but the width is divided by it; use for example 16"
            )
