"""Markers that several test files share."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from peftkit_kernels import native

needs_native = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
"""For tests of the native passes. Without a C compiler torch's operations run instead."""


def slow_if(condition: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, of which those that satisfy the condition are marked ``slow``."""
    return [
        pytest.param(value, marks=pytest.mark.slow) if condition(value) else value
        for value in values
    ]
