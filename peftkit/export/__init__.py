"""Export models and adapters to GGUF, the file format of llama.cpp, and prove that the file computes the same."""

from peftkit.export.adapter_file import export_adapter_gguf
from peftkit.export.model_file import ExportReport, export_gguf

__all__ = ["ExportReport", "export_adapter_gguf", "export_gguf"]
