"""The names under which our methods are known to PEFT."""

from enum import Enum


class PeftkitType(str, Enum):
    """Stands where PEFT has a ``PeftType``: equal to its string, and its ``value`` is what ``adapter_config.json`` holds."""

    PEFTKIT_BOTTLENECK = "PEFTKIT_BOTTLENECK"
    PEFTKIT_PREFIX = "PEFTKIT_PREFIX"
    PEFTKIT_MIX = "PEFTKIT_MIX"
