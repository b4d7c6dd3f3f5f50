"""Crossovers of schedules measured on a GPU, kept between processes by the name of the device.

Nothing is measured unasked: ``python benchmarks/run.py kernels --calibrate`` writes the file, the first launch on a GPU reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from peftkit_kernels.cache import cache_folder


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where one schedule overtakes another.

    Attributes:
        fused_width: Layers up to this width take the update inside the product (kernel ``gemm_lora``) instead of before it.
        small_m: Rows up to which a quantised weight is decoded inside the product where its columns fill the GPU; ``None`` is the
            architecture's default.
    """

    fused_width: int = 2048
    small_m: int | None = None


def load(device: str, path: Path | None = None) -> Calibration:
    """What was measured on ``device``, or the defaults where nothing was.

    Args:
        device: Name, as ``torch.cuda.get_device_name`` gives it.
        path: The file; in the user's cache by default.

    Raises:
        ValueError: The file holds something else.
    """
    path = path or calibration_file()
    if not path.exists():
        return Calibration()
    try:
        return Calibration(**json.loads(path.read_text()).get(device, {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no calibration ({error}); delete it, or measure again by "
            "python benchmarks/run.py kernels --calibrate"
        ) from error


def save(device: str, calibration: Calibration, path: Path | None = None) -> Path:
    """Keep ``calibration`` for ``device`` beside what is known of others; returns the file."""
    path = path or calibration_file()
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known | {device: asdict(calibration)}, indent=1) + "\n")
    temporary.replace(path)
    return path


def calibration_file() -> Path:
    """Where calibrations are kept."""
    return cache_folder() / "calibration.json"
