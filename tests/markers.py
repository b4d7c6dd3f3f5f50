"""Markers that several test files share."""

import pytest

from peftkit_kernels import native

needs_native = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
"""For tests of the native passes. Without a C compiler torch's operations run instead."""
