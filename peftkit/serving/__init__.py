"""Whether an adapter serves as trained: in PEFT, vLLM, SGLang and llama.cpp; and rewriting it so that it does."""

from peftkit.serving.convert import convert_adapter
from peftkit.serving.report import TARGETS, ServingReport, serving_report
from peftkit.serving.rows import Row

__all__ = ["TARGETS", "Row", "ServingReport", "convert_adapter", "serving_report"]
