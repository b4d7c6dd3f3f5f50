"""Read recordings from WAV files with the standard library."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import short
from peftkit.finetune.tasks.base import BadRow

_LARGEST = {1: 128.0, 2: 2.0**15, 3: 2.0**23, 4: 2.0**31}
"""Bytes of a sample to the size of the largest one."""


def length_of(path: Any, rate: int) -> int:
    """The number of samples of a recording.

    Args:
        path: A WAV file.
        rate: Samples a second that the model expects.

    Raises:
        BadRow: The file cannot be read, is empty, or has another rate. Nothing is resampled.
    """
    if not isinstance(path, str) or not path:
        raise BadRow(f"column 'audio' is {short(path)}, not the path of a WAV file")
    if not Path(path).is_file():
        raise BadRow(f"the recording {path} does not exist")
    try:
        with wave.open(path, "rb") as file:
            found, samples = file.getframerate(), file.getnframes()
    except (wave.Error, EOFError) as error:
        raise BadRow(
            f"{path} is no WAV file with whole numbers ({error}); convert it: ffmpeg -i {path} -ar {rate} -ac 1 NEW.wav"
        ) from error
    if found != rate:
        raise BadRow(
            f"{path} has {found} samples a second, but the model expects {rate}; convert it: ffmpeg -i {path} -ar {rate} -ac 1 NEW.wav"
        )
    if samples == 0:
        raise BadRow(f"{path} is empty")
    return samples


def read_wav(path: str) -> np.ndarray:
    """Read a WAV file: ``Float32[samples]`` between -1 and 1, the mean of the channels."""
    with wave.open(path, "rb") as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        content = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    if width == 1:  # the only kind without a sign
        values = content.astype(np.float64) - 128
    else:
        # Each sample is moved to the upper bytes of a whole number of 32 bits.
        padded = np.zeros((len(content) // width, 4), np.uint8)
        padded[:, 4 - width :] = content.reshape(-1, width)
        values = padded.reshape(-1).view("<i4").astype(np.float64) / 2.0 ** (8 * (4 - width))
    return (values / _LARGEST[width]).reshape(-1, channels).mean(1).astype(np.float32)
