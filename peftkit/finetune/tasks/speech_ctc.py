"""Speech recognition with a CTC model, such as Wav2Vec2 or HuBERT: each frame of a recording has a character or a blank."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftkit.errors import ContractError, short
from peftkit.finetune.sound import length_of, read_sound, require_resampling
from peftkit.finetune.tasks.base import IGNORED, BadRow, Encoded, Setting, Task, pad, text_of
from peftkit.finetune.transcripts import TextOptions, changed_text, error_rates

if TYPE_CHECKING:
    import torch


class SpeechCtc(Task):
    """Recordings with their texts. The vocabulary is that of the model's processor.

    Source: Graves et al., 2006, "Connectionist temporal classification"; Baevski et al., 2020, arXiv:2006.11477.
    """

    name = "speech_ctc"
    summary = "recordings with their texts, for Wav2Vec2 and its relatives"
    auto_class = "AutoModelForCTC"
    columns: ClassVar[dict[str, str]] = {"audio": "path of a recording", "text": "what is said"}
    Options = TextOptions
    metric_names = ("wer", "cer")
    lower_is_better = ("loss", "wer", "cer")
    seq_len = 1024
    processor = "speech"
    smooths_labels = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_resampling(setting.options.resample)
        if not hasattr(setting.config, "conv_kernel"):
            raise ContractError(
                f"task=speech_ctc needs a model of the Wav2Vec2 kind, whose config has conv_kernel; this one is a "
                f"{getattr(setting.config, 'model_type', 'model without a type')}"
            )
        self.rate = setting.tokenizer.feature_extractor.sampling_rate
        self.characters = setting.tokenizer.tokenizer
        self.config = setting.config

    def model_arguments(self) -> dict[str, Any]:
        # The blank is the padding token. A skipped layer would get no gradient in that step.
        return {
            "pad_token_id": self.characters.pad_token_id,
            "ctc_loss_reduction": "mean",
            "layerdrop": 0.0,
        }

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        options = self.setting.options
        text = changed_text(text_of(row, "text"), options)
        ids = list(self.characters(text).input_ids)
        unknown = sorted({c for c in text if self._is_unknown(c)})
        if unknown:
            raise BadRow(
                f"the model's vocabulary has no {', '.join(map(repr, unknown))}; set task.case, or task.remove"
            )
        if not ids:
            raise BadRow("no character is left of the text")
        samples = length_of(row.get("audio"), self.rate, options.resample)
        seconds = samples / self.rate
        if seconds > options.max_seconds:
            raise BadRow(
                f"{row['audio']} has {seconds:.1f} s, more than task.max_seconds={options.max_seconds:g}; split it with its text"
            )
        # Equal neighbours need a blank between them.
        needed = len(ids) + sum(one == other for one, other in pairwise(ids))
        frames = frames_of(samples, self.config)
        masked = getattr(self.config, "mask_time_prob", 0.0) > 0
        needed = max(needed, self.config.mask_time_length + 1 if masked else 1)
        if frames < needed:
            raise BadRow(
                f"{row['audio']} has {seconds:.2f} s, which the model sees as {frames} frames, but the text {short(text)} and the masks of "
                f"training need {needed}"
            )
        features = {"audio": row["audio"], "samples": samples, "labels": ids}
        return [Encoded(features, len(ids), len(ids) if len(ids) <= self.setting.seq_len else 0)]

    def _is_unknown(self, character: str) -> bool:
        if character.isspace():
            return False
        ids = self.characters(character).input_ids
        return self.characters.unk_token_id in ids or not ids

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = self.setting.tokenizer.feature_extractor(
            [read_sound(row["audio"], self.rate) for row in rows],
            sampling_rate=self.rate,
            padding=True,
            return_tensors="pt",
        )
        return dict(found) | {"labels": pad([row["labels"] for row in rows], IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        return f"{features['audio']} -> «{self._text(features['labels'], group=False)}»"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        largest = max(max(row["labels"]) for row in rows)
        if largest >= model.config.vocab_size:
            raise ContractError(
                f"the processor makes the token id {largest}, but the model's head has {model.config.vocab_size} outputs; set vocab_size in "
                "its config.json"
            )

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def scores(self, rows: Any, predictions: Any, labels: Any) -> dict[str, float]:
        found = []
        for row, ids in zip(rows, np.asarray(predictions), strict=True):
            # What follows the recording is padding of the batch.
            found.append(self._text(ids[: frames_of(row["samples"], self.config)], group=True))
        wanted = [self._text(row["labels"], group=False) for row in rows]
        return error_rates(found, wanted)

    def _text(self, ids: Any, group: bool) -> str:
        text = self.characters.decode([int(i) for i in ids], group_tokens=group)
        return " ".join(text.split())


def frames_of(samples: int, config: Any) -> int:
    """The number of outputs for a recording: each convolution gives one for every ``stride`` inputs that fit its kernel."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


TASK = SpeechCtc
