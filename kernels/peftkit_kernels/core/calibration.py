"""Which schedule is faster at which size: measured on a GPU and stored in a file by the name of the device.

Nothing is measured unless the user requests it: ``python benchmarks/run.py kernels --calibrate`` writes the file, and the
first launch on a GPU reads it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peftkit_kernels.core import cache

_MAX_BYTES = 2**16
"""Enough for hundreds of devices; a larger file is not read."""

_UNUSABLE = (ValueError, RecursionError, OSError, cache.Unsafe)
"""The errors that reading a file can raise; JSON that is nested too deeply raises ``RecursionError``."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The sizes at which one schedule becomes faster than another.

    Attributes:
        fused_width: Layers up to this width add the update inside the product (kernel ``gemm_lora``) instead of before it.
        small_m: Up to this number of rows a quantised weight is decoded inside the product, if its columns fill the GPU.
            ``None`` is the architecture's default.
    """

    fused_width: int = 2048
    small_m: int | None = None


def load(device: str, path: Path | None = None) -> Calibration:
    """The calibration measured on ``device``, or the defaults if there is none.

    A file that is malformed, or that someone else could have written, is ignored with a warning. A file that this user may
    not read is ignored without one; ``obstacle`` reports it.

    Args:
        device: The name, as ``torch.cuda.get_device_name`` returns it.
        path: The file; by default the one in the user's cache.
    """
    try:
        return _read(path).get(device, Calibration())
    except PermissionError:
        return Calibration()
    except _UNUSABLE as error:
        warnings.warn(f"the defaults are used instead of a calibration: {error}", stacklevel=2)
        return Calibration()


def obstacle(path: Path | None = None) -> str | None:
    """Why the calibration file is ignored, as a sentence; ``None`` if the file is used or does not exist."""
    try:
        _read(path)
    except _UNUSABLE as error:
        return str(error)
    return None


def save(device: str, calibration: Calibration, path: Path | None = None) -> Path:
    """Store ``calibration`` for ``device`` in the file, beside those of other devices.

    A file that ``load`` would ignore is replaced.

    Returns:
        The file.

    Raises:
        peftkit_kernels.core.cache.Unsafe: The folder belongs to someone else, or others can write to it.
        OSError: The file cannot be written.
    """
    path = path or calibration_file()
    cache.make_folder(path.parent)
    try:
        known = _read(path)
    except _UNUSABLE:
        known = {}
    known[device] = calibration
    text = json.dumps({name: asdict(value) for name, value in known.items()}, indent=1)
    cache.write_file(path, f"{text}\n".encode())
    return path


def calibration_file() -> Path:
    """The path of the calibration file; raises as ``cache_folder``."""
    return cache.cache_folder() / "calibration.json"


def _read(path: Path | None) -> dict[str, Calibration]:
    """The calibrations in a file, by device; none if there is no file."""
    try:
        path = path or calibration_file()
    except cache.Unsafe:
        return {}  # without a home folder nothing was stored
    if not path.exists():
        return {}
    content = cache.read_file(path, _MAX_BYTES)
    try:
        known = json.loads(content)
        if not isinstance(known, dict):
            raise ValueError(f"it contains a {type(known).__name__}, not an object")
        return {device: _parse(device, values) for device, values in known.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a calibration ({error}); delete it, or measure again with "
            "python benchmarks/run.py kernels --calibrate"
        ) from error


def _parse(device: str, values: Any) -> Calibration:
    names = {field.name for field in fields(Calibration)}
    if not isinstance(values, dict) or not names.issuperset(values):
        raise ValueError(
            f"the entry of {device!r} must be an object with keys among {', '.join(sorted(names))}"
        )
    for name, value in values.items():
        is_size = type(value) is int and 0 <= value < 2**31
        if not (is_size or (name == "small_m" and value is None)):
            raise ValueError(
                f"{name} of {device!r} is {value!r:.40}, not an integer from 0 to {2**31 - 1}"
            )
    return Calibration(**values)
