"""The releases of transformers and PEFT with which peftkit has been tested."""

import warnings
from importlib.metadata import version

from packaging.version import Version

NEWEST_TESTED = {"transformers": "5.23", "peft": "0.21"}
"""Newest tested minor release by distribution; its patch releases count as tested."""


def newer_than_tested() -> list[str]:
    """Return a phrase for each installed library that is newer than the newest tested release."""
    return [
        f"{name} {version(name)} (tested up to {newest})"
        for name, newest in NEWEST_TESTED.items()
        if Version(version(name)).release[:2] > Version(newest).release
    ]


def warn_if_newer_than_tested() -> None:
    """Warn if a library is newer than its newest tested release. Python's default filters show the warning once per process."""
    newer = newer_than_tested()
    if newer:
        warnings.warn(
            f"peftkit has not been tested with {' and '.join(newer)}; if something looks wrong, "
            "compare with peftkit.restore(model), which runs PEFT's own code",
            UserWarning,
            stacklevel=1,
        )
