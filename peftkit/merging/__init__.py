"""Merge adapters into a checkpoint of the base model, with a certificate of what was kept."""

from peftkit.merging.certificate import Certificate, Difference, LayerDifference
from peftkit.merging.checkpoint import merge

__all__ = ["Certificate", "Difference", "LayerDifference", "merge"]
