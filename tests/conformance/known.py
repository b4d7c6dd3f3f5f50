"""Tests of PEFT that pass with stock layers and not with fused ones, each with its reason."""

KNOWN: dict[str, str] = {}
