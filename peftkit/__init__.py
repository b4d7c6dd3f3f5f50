"""Fine-tune pretrained Hugging Face models on one machine: LoRA that is still PEFT's, with less work.

The public names below are loaded when first used, so that ``import peftkit`` loads neither torch nor
transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

    from peftkit.bridge import BottleneckConfig, PrefixConfig
    from peftkit.contract import ContractError, check, load_adapter
    from peftkit.explain import Report, explain
    from peftkit.interop import import_adapter
    from peftkit.lora.plus import lora_plus_groups
    from peftkit.wrap import accelerate, restore, wrap

__version__ = "0.1.0"

__all__ = [
    "BottleneckConfig",
    "ContractError",
    "LoraConfig",
    "PrefixConfig",
    "Report",
    "__version__",
    "accelerate",
    "check",
    "explain",
    "import_adapter",
    "load_adapter",
    "lora_plus_groups",
    "restore",
    "wrap",
]

_HOME_OF = {
    "BottleneckConfig": "peftkit.bridge",
    "ContractError": "peftkit.contract",
    "LoraConfig": "peft",
    "PrefixConfig": "peftkit.bridge",
    "Report": "peftkit.explain",
    "accelerate": "peftkit.wrap",
    "check": "peftkit.contract",
    "explain": "peftkit.explain",
    "import_adapter": "peftkit.interop",
    "load_adapter": "peftkit.contract",
    "lora_plus_groups": "peftkit.lora.plus",
    "restore": "peftkit.wrap",
    "wrap": "peftkit.wrap",
}


class _Package(ModuleType):
    """This package, with ``peftkit.wrap`` and ``peftkit.explain`` always meaning the functions.

    The import system binds a submodule as an attribute of its package when the submodule is first
    imported, by whatever path. Without this, ``peftkit.wrap`` would be a function or a module
    depending on who imported what before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME_OF and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
