"""Starts of LoRA adapters that are computed from the base weights, on bases of every storage."""

from peftkit.inits.initialise import initialise
from peftkit.inits.report import InitReport, LayerStart

__all__ = ["InitReport", "LayerStart", "initialise"]
