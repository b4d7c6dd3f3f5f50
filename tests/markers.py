"""Marks that several test files share."""

import pytest

from peftkit_kernels import native

needs_native = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
"""For what the native passes do; without a C compiler torch's operations run instead."""
