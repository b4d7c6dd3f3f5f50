"""Speech from text with SpeechT5: a text and a speaker in, a log-mel spectrogram out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.sound import length_of, read_sound, require_resampling
from peftkit.finetune.speakers import embedding_of
from peftkit.finetune.tasks.base import BadRow, Encoded, Setting, Task, pad_tokens, text_of
from peftkit.finetune.transcripts import TextOptions, changed_text

if TYPE_CHECKING:
    import torch

_PADDING = -100.0
"""Rows of a spectrogram of this value take no part in SpeechT5's loss, which finds the end of each row by them."""

_REASONS = {
    "vits": "transformers cannot train VITS: its model raises NotImplementedError if it gets labels",
    "fastspeech2_conformer": "FastSpeech2 needs the duration of each phoneme, which a recording and its text do not have",
}


@dataclass
class Options(TextOptions):
    """Options of ``text_to_speech``."""

    speaker: str | None = key(
        None, "A .npy file with the speaker's embedding, for rows without the column speaker"
    )


class TextToSpeech(Task):
    """Texts with recordings of them. The targets are the log-mel spectrograms that SpeechT5's feature extractor makes.

    The dropout before SpeechT5's decoder is always on, so evaluations draw the same random numbers each time.

    Source: Ao et al., 2021, arXiv:2110.07205 (SpeechT5).
    """

    name = "text_to_speech"
    summary = "texts with recordings of them and an embedding of the speaker, for SpeechT5"
    auto_class = "AutoModelForTextToSpectrogram"
    columns: ClassVar[dict[str, str]] = {
        "text": "what is said",
        "audio": "path of a recording",
        "speaker": "embedding of the speaker: numbers, or the path of a .npy file",
    }
    Options = Options
    metric_names = ("mel_l1",)
    lower_is_better = ("loss", "mel_l1")
    has_own_counts = True
    seq_len = 600
    processor = "speech and text"
    example_model = "microsoft/speecht5_tts"
    smooths_labels = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        kind = getattr(setting.config, "model_type", None)
        if kind != "speecht5":
            raise ContractError(
                f"task={self.name} trains SpeechT5, and this model is a {kind}; "
                + _REASONS.get(kind or "", "use a checkpoint such as microsoft/speecht5_tts")
            )
        require_resampling(setting.options.resample)
        self.extractor, self.config = setting.processor.feature_extractor, setting.config
        self.factor = self.config.reduction_factor
        self.default: list[float] | None = None
        if setting.options.speaker is not None:
            try:
                self.default = self._embedding(setting.options.speaker)
            except BadRow as error:
                raise ContractError(f"task.speaker: {error}") from error

    def _embedding(self, value: Any) -> list[float]:
        return embedding_of(value, self.config.speaker_embedding_dim)

    def model_arguments(self) -> dict[str, Any]:
        # A layer that is skipped would get no gradient in that step.
        return {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

    def fit_model(self, model: Any) -> None:
        import torch

        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if dtype != torch.float32:
            raise ContractError(
                f"the model is loaded in {dtype}, in which the spectrograms that it should learn would be rounded; use base=fp32, and "
                "training.precision=bf16 on a GPU"
            )

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        text = changed_text(text_of(row, "text"), self.setting.options)
        ids = self._ids(text)
        frames = self._frames(row.get("audio"))
        given = row.get("speaker")
        if given in (None, "") and self.default is None:
            raise BadRow(
                "no column 'speaker' with the embedding of the speaker; add it, or set task.speaker to a .npy file for all rows"
            )
        speaker = self.default if given in (None, "") else self._embedding(given)
        features = {
            "audio": row["audio"],
            "frames": frames,
            "input_ids": ids,
            "speaker": speaker,
        }
        # A part of a text would have the recording of all of it.
        fits = len(ids) <= self.setting.seq_len
        return [Encoded(features, len(ids), frames if fits else 0)]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self.setting.tokenizer
        ids = list(tokenizer(text).input_ids)
        if tokenizer.unk_token_id in ids:
            unknown = sorted(
                {
                    c
                    for c in text
                    if tokenizer.unk_token_id in tokenizer(c, add_special_tokens=False).input_ids
                }
            )
            raise BadRow(
                f"the model's vocabulary has no {', '.join(map(repr, unknown)) or 'token for a part of the text'}; spell it otherwise, or set "
                "task.case or task.remove"
            )
        if len(ids) <= 1:
            raise BadRow("no character is left of the text")
        return ids

    def _frames(self, path: Any) -> int:
        """Frames of the spectrogram, cut to whole steps of the decoder, each of which makes ``reduction_factor`` frames."""
        options, rate = self.setting.options, self.extractor.sampling_rate
        samples = length_of(path, rate, options.resample)
        if samples / rate > options.max_seconds:
            raise BadRow(
                f"{path} has {samples / rate:.1f} s, more than task.max_seconds={options.max_seconds:g}; split it with its text"
            )
        frames = (1 + samples // self.extractor.sample_stride) // self.factor * self.factor
        if samples < self.extractor.n_fft or frames == 0:
            raise BadRow(f"{path} has {samples} samples, which are too few for a spectrogram")
        most = self.config.max_speech_positions * self.factor
        if frames > most:
            raise BadRow(
                f"{path} has {frames} frames, and the model has positions for {most}; split it with its text"
            )
        return frames

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        batch = pad_tokens(rows, self.setting.tokenizer.pad_token_id)
        longest = max(row["frames"] for row in rows)
        labels = torch.full((len(rows), longest, self.extractor.num_mel_bins), _PADDING)
        for place, row in zip(labels, rows, strict=True):
            place[: row["frames"]] = torch.from_numpy(self._spectrogram(row))
        speakers = torch.tensor([row["speaker"] for row in rows], dtype=torch.float32)
        return batch | {"labels": labels, "speaker_embeddings": speakers}

    def _spectrogram(self, row: dict[str, Any]) -> np.ndarray:
        """``Float32[frames, bins]``, the decimal logarithm of the mel spectrogram."""
        rate = self.extractor.sampling_rate
        found = self.extractor(
            audio_target=read_sound(row["audio"], rate), sampling_rate=rate
        ).input_values[0]
        if len(found) < row["frames"]:
            raise ContractError(
                f"{row['audio']} has {len(found)} frames, fewer than before training ({row['frames']}); was the file changed?"
            )
        return found[: row["frames"]]

    def render(self, features: dict[str, Any]) -> str:
        text = self.setting.tokenizer.decode(features["input_ids"])
        return f"{text} -> «{features['frames']} frames of {features['audio']}»"

    def counted(self, inputs: dict[str, Any], outputs: Any) -> tuple[Any, Any]:
        """For each row the sum of the absolute errors of its spectrogram, and the number of its values."""
        import torch

        labels = inputs["labels"]
        used = labels != _PADDING
        errors = ((outputs.spectrogram - labels).abs() * used).sum((1, 2), dtype=torch.float64)
        return torch.stack([errors, used.sum((1, 2)).double()], dim=1), used.sum((1, 2))

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"mel_l1": float(predictions[:, 0].sum() / predictions[:, 1].sum())}


TASK = TextToSpeech
