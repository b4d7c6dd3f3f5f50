"""Read recordings: WAV files of whole numbers with the standard library, other files with the package soundfile."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import ContractError, short
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow

RESAMPLE = key(
    False, "Change the sampling rate of recordings instead of refusing them (needs the extra audio)"
)
"""The option of tasks with recordings."""

_LARGEST = {1: 128.0, 2: 2.0**15, 3: 2.0**23, 4: 2.0**31}
"""Bytes of a sample to the size of the largest one."""


def require_resampling(resample: bool) -> None:
    """Raise ``ContractError`` if ``task.resample`` is set, but the package soxr is not installed."""
    if resample and _module("soxr") is None:
        raise ContractError(
            "task.resample=true needs the package soxr: pip install 'peftkit[audio]', or remove it"
        )


def length_of(path: Any, rate: int, resample: bool = False) -> int:
    """The number of samples that ``read_sound`` returns, from the head of the file.

    Args:
        path: A file with a recording.
        rate: Samples a second that the model expects.
        resample: Accept other rates.

    Raises:
        BadRow: The file cannot be read, is empty, or has another rate.
    """
    if not isinstance(path, str) or not path:
        raise BadRow(f"column 'audio' is {short(path)}, not the path of a recording")
    if not Path(path).is_file():
        raise BadRow(f"the recording {path} does not exist")
    found, samples = _head(path, rate)
    if found != rate and not resample:
        raise BadRow(
            f"{path} has {found} samples a second, but the model expects {rate}; set task.resample=true, or convert it: {_command(path, rate)}"
        )
    samples = resampled_length(samples, found, rate)
    if samples == 0:
        raise BadRow(f"{path} is empty")
    return samples


def read_sound(path: str, rate: int) -> np.ndarray:
    """Read a recording with ``rate`` samples a second: ``Float32[samples]``, the mean of the channels, for whole numbers between -1 and 1.

    Another rate is changed with soxr, whose quality is ``"HQ"``: frequencies above half the smaller rate are removed.
    """
    try:
        found, values = _read_wav(path)
    except (wave.Error, EOFError):
        values, found = _module("soundfile").read(path, dtype="float64", always_2d=True)
    values = values.mean(1)
    if found != rate:
        # The whole recording at once, so that the parts of a file do not matter.
        values = _module("soxr").resample(values, found, rate, quality="HQ")
    return values.astype(np.float32)


def resampled_length(samples: int, before: int, after: int) -> int:
    """The number of samples after a change of the rate: soxr rounds to the nearest."""
    return (2 * samples * after + before) // (2 * before)


def _head(path: str, rate: int) -> tuple[int, int]:
    """Samples a second and the number of samples."""
    try:
        with wave.open(path, "rb") as file:
            return file.getframerate(), file.getnframes()
    except (wave.Error, EOFError) as error:
        soundfile = _module("soundfile")
        if soundfile is None:
            raise BadRow(
                f"{path} is no WAV file of whole numbers ({error}), and the package soundfile, which reads other files, is not installed: pip "
                f"install 'peftkit[audio]', or convert it: {_command(path, rate)}"
            ) from error
    try:
        found = soundfile.info(path)
    except soundfile.SoundFileError as error:
        raise BadRow(
            f"{path} is no recording that soundfile can read ({error}); convert it: {_command(path, rate)}"
        ) from error
    return found.samplerate, found.frames


def _command(path: str, rate: int) -> str:
    return f"ffmpeg -i {path} -ar {rate} -ac 1 NEW.wav"


def _module(name: str) -> Any:
    """A package of the extra ``audio``, or ``None`` if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _read_wav(path: str) -> tuple[int, np.ndarray]:
    """Samples a second and ``Float64[samples, channels]`` of a WAV file of whole numbers."""
    with wave.open(path, "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        content = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    if width == 1:  # the only kind without a sign
        values = content.astype(np.float64) - 128
    else:
        # Each sample is moved to the upper bytes of a whole number of 32 bits.
        padded = np.zeros((len(content) // width, 4), np.uint8)
        padded[:, 4 - width :] = content.reshape(-1, width)
        values = padded.reshape(-1).view("<i4").astype(np.float64) / 2.0 ** (8 * (4 - width))
    return rate, (values / _LARGEST[width]).reshape(-1, channels)
