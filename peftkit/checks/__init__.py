"""Checks that a model would train: adapters exist and are active, gradients reach them, values are finite."""

from peftkit.checks.training import CheckReport, check

__all__ = ["CheckReport", "check"]
