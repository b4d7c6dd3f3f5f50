"""Recordings are read exactly from every kind of file, and their rate is changed only if it is asked for."""

import wave

import finetune_cases as cases
import numpy as np
import pytest
import soundfile
import speech_cases

from peftkit import ContractError
from peftkit.finetune import sound, train
from peftkit.finetune.sound import length_of, read_sound, resampled_length
from peftkit.finetune.tasks.base import BadRow

RATE = 16000
EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_file_is_read_exactly(width, channels, tmp_path):
    values = np.linspace(-0.9, 0.9, 60)
    file = speech_cases.write_wav(tmp_path / "a.wav", values, width=width, channels=channels)
    found = read_sound(str(file), speech_cases.RATE)
    expected = values.reshape(-1, channels).mean(1)
    assert found.dtype == np.float32
    # One rounding to whole numbers of this width, whose largest is one less than their range, and one to float32.
    assert np.abs(found - expected).max() <= 2 / 2.0 ** (8 * width - 1) + EPS


KINDS = {
    "a.flac": ("PCM_16", 2.0**-15),
    "b.flac": ("PCM_24", 2.0**-23),
    "a.wav": ("FLOAT", EPS),
    "b.wav": ("DOUBLE", EPS),
    "a.aiff": ("PCM_24", 2.0**-23),
    # Lossy: the error must only be far below that of other samples.
    "a.ogg": ("VORBIS", 0.05),
    "a.mp3": ("MPEG_LAYER_III", 0.05),
    "c.wav": ("ULAW", 0.05),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_other_files_are_read(name, channels, tmp_path):
    kind, allowed = KINDS[name]
    path = tmp_path / name
    times = np.arange(3001) / RATE
    tones = np.stack([np.sin(2 * np.pi * f * times) * 0.5 for f in (300, 500)[:channels]], axis=1)
    soundfile.write(path, tones, RATE, subtype=kind)
    found = read_sound(str(path), RATE)
    assert length_of(str(path), RATE) == len(found) == 3001
    assert found.dtype == np.float32
    error = np.abs(found - tones.mean(1))
    if allowed < 0.05:
        assert error.max() <= allowed + EPS
    else:
        # Codecs of whole windows are worse at the edges.
        assert error[500:-500].max() <= allowed


def test_numbers_above_one_of_a_float_file_are_kept(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([1.5, -2.0]), RATE, subtype="FLOAT")
    assert read_sound(str(tmp_path / "a.wav"), RATE).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("before", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_is_changed(before, tmp_path):
    size = before // 2 + 1
    frequencies = (300, 6000 if before > RATE else 1000)
    times = np.arange(size) / before
    low, high = (np.sin(2 * np.pi * f * times) * 0.4 for f in frequencies)
    # Above half of the new rate nothing must be left, which would be heard as another tone.
    beyond = np.sin(2 * np.pi * 9500 * times) * 0.2 if before > RATE else 0
    soundfile.write(tmp_path / "a.flac", low + high + beyond, before, subtype="PCM_24")
    path = str(tmp_path / "a.flac")
    with pytest.raises(BadRow, match=f"has {before} samples a second, .* set task.resample=true"):
        length_of(path, RATE)
    found = read_sound(path, RATE)
    assert len(found) == length_of(path, RATE, resample=True)
    times = np.arange(len(found)) / RATE
    expected = sum(np.sin(2 * np.pi * f * times) * 0.4 for f in frequencies)
    # The filter is cut off at both ends; inside, soxr promises a pass band that is flat to 0.01 dB.
    assert np.abs(found - expected)[1000:-1000].max() <= 0.8 * (10 ** (0.01 / 20) - 1)


def test_lengths_are_those_of_soxr():
    import soxr

    for before, after in ((44100, 16000), (8000, 16000), (22050, 16000), (11025, 24000)):
        for size in (1, 2, 3, 7, 99, 100, 1001, 44101):
            found = soxr.resample(np.zeros(size), before, after, quality="HQ")
            assert len(found) == resampled_length(size, before, after)


def test_a_recording_that_vanishes_is_empty(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(1), 48000)
    with pytest.raises(BadRow, match=r"a\.flac is empty"):
        length_of(str(tmp_path / "a.flac"), RATE, resample=True)


def test_a_run_reads_and_resamples_flac_files(tmp_path, one_thread):
    model = speech_cases.save_whisper(tmp_path / "m")
    rows = speech_cases.speech(tmp_path / "s", 8, 48000)
    for row in rows:
        values = read_sound(row["audio"], 48000)
        row["audio"] = row["audio"].replace(".wav", ".flac")
        soundfile.write(row["audio"], values, 48000)
    task = {"name": "speech_seq2seq", "language": "en"}
    with pytest.raises(ContractError, match="has 48000 samples a second"):
        train(cases.recipe(model, task, rows, tmp_path / "run"))
    task["resample"] = True
    assert train(cases.recipe(model, task, rows, tmp_path / "run")).problems == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros(100), RATE)
    monkeypatch.setattr(sound, "_module", lambda name: None)
    with pytest.raises(BadRow, match=r"the package soundfile, .* pip install 'peftkit\[audio\]'"):
        length_of(str(tmp_path / "a.flac"), RATE)
    with pytest.raises(ContractError, match=r"task.resample=true needs the package soxr"):
        sound.require_resampling(True)
    sound.require_resampling(False)


def test_a_file_that_is_cut_off_is_no_recording(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    with pytest.raises(BadRow, match=r"a\.wav is empty"):
        length_of(str(tmp_path / "a.wav"), RATE)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(BadRow, match="no recording that soundfile can read"):
        length_of(str(tmp_path / "b.wav"), RATE)
