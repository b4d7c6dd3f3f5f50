"""Fine-tune pretrained Hugging Face models on one machine, with fused kernels for PEFT's LoRA layers.

Each public name is imported at its first use, so that ``import peftkit`` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

    from peftkit.base import BaseReport, base_report, load_base
    from peftkit.bridge import BottleneckConfig, PrefixConfig
    from peftkit.checks import check
    from peftkit.compress import PruneReport, prune
    from peftkit.errors import ContractError
    from peftkit.export import ExportReport, export_adapter_gguf, export_gguf
    from peftkit.finetune import Recipe, RunResult, evaluate, generate, read_recipe, train
    from peftkit.finetune.comparison import Comparison, compare
    from peftkit.finetune.report_callback import ReportCallback
    from peftkit.finetune.together.sweeping import Sweep, sweep
    from peftkit.fp8 import Float8Linear, from_fp8, to_fp8
    from peftkit.inits import InitReport, initialise
    from peftkit.interop import import_adapter
    from peftkit.loading import load_adapter
    from peftkit.lora_plus import lora_plus_groups
    from peftkit.merging import merge
    from peftkit.planning import MemoryPlan, fit, plan
    from peftkit.report import Report, explain
    from peftkit.serving import ServingReport, convert_adapter, serving_report
    from peftkit.wrapping import accelerate, restore, wrap

__version__ = "0.1.0"

__all__ = [
    "BaseReport",
    "BottleneckConfig",
    "Comparison",
    "ContractError",
    "ExportReport",
    "Float8Linear",
    "InitReport",
    "LoraConfig",
    "MemoryPlan",
    "PrefixConfig",
    "PruneReport",
    "Recipe",
    "Report",
    "ReportCallback",
    "RunResult",
    "ServingReport",
    "Sweep",
    "__version__",
    "accelerate",
    "base_report",
    "check",
    "compare",
    "convert_adapter",
    "evaluate",
    "explain",
    "export_adapter_gguf",
    "export_gguf",
    "fit",
    "from_fp8",
    "generate",
    "import_adapter",
    "initialise",
    "load_adapter",
    "load_base",
    "lora_plus_groups",
    "merge",
    "plan",
    "prune",
    "read_recipe",
    "restore",
    "serving_report",
    "sweep",
    "to_fp8",
    "train",
    "wrap",
]

_HOME_OF = {
    "BaseReport": "peftkit.base",
    "BottleneckConfig": "peftkit.bridge",
    "Comparison": "peftkit.finetune",
    "ContractError": "peftkit.errors",
    "ExportReport": "peftkit.export",
    "Float8Linear": "peftkit.fp8",
    "InitReport": "peftkit.inits",
    "LoraConfig": "peft",
    "MemoryPlan": "peftkit.planning",
    "PrefixConfig": "peftkit.bridge",
    "PruneReport": "peftkit.compress",
    "Recipe": "peftkit.finetune",
    "Report": "peftkit.report",
    "ReportCallback": "peftkit.finetune.report_callback",
    "RunResult": "peftkit.finetune",
    "ServingReport": "peftkit.serving",
    "Sweep": "peftkit.finetune",
    "accelerate": "peftkit.wrapping",
    "base_report": "peftkit.base",
    "check": "peftkit.checks",
    "compare": "peftkit.finetune",
    "convert_adapter": "peftkit.serving",
    "evaluate": "peftkit.finetune",
    "explain": "peftkit.report",
    "export_adapter_gguf": "peftkit.export",
    "export_gguf": "peftkit.export",
    "fit": "peftkit.planning",
    "from_fp8": "peftkit.fp8",
    "generate": "peftkit.finetune",
    "import_adapter": "peftkit.interop",
    "initialise": "peftkit.inits",
    "load_adapter": "peftkit.loading",
    "load_base": "peftkit.base",
    "lora_plus_groups": "peftkit.lora_plus",
    "merge": "peftkit.merging",
    "plan": "peftkit.planning",
    "prune": "peftkit.compress",
    "read_recipe": "peftkit.finetune",
    "restore": "peftkit.wrapping",
    "serving_report": "peftkit.serving",
    "sweep": "peftkit.finetune",
    "to_fp8": "peftkit.fp8",
    "train": "peftkit.finetune",
    "wrap": "peftkit.wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
