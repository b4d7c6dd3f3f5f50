"""The names of peftkit's methods in PEFT's tables."""

from enum import Enum


class PeftkitType(str, Enum):
    """Used in place of PEFT's ``PeftType``. A member equals its string, and ``adapter_config.json`` has its ``value``."""

    PEFTKIT_BOTTLENECK = "PEFTKIT_BOTTLENECK"
    PEFTKIT_PREFIX = "PEFTKIT_PREFIX"
    PEFTKIT_MIX = "PEFTKIT_MIX"
