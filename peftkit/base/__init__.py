"""The frozen base model: load it, quantise it while it is read, and say how it is stored."""

from peftkit.base.load import load_base
from peftkit.base.summary import BaseReport, base_report

__all__ = ["BaseReport", "base_report", "load_base"]
