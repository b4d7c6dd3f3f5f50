"""Import adapters saved by other libraries: PEFT's prefix tuning and AdapterHub's bottleneck adapters."""

from peftkit.interop.importing import import_adapter

__all__ = ["import_adapter"]
