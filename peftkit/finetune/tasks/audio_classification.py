"""One class for a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.finetune.schema import key
from peftkit.finetune.sound import RESAMPLE, length_of, read_sound, require_resampling
from peftkit.finetune.tasks.base import (
    BadRow,
    Encoded,
    Setting,
    Task,
    label_name,
    number_of_label,
    sorted_labels,
)
from peftkit.finetune.tasks.scores import accuracy, macro_f1

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``audio_classification``."""

    max_seconds: float = key(10.0, "Longest recording; longer ones are bad rows", above=0)
    min_seconds: float = key(
        0.25, "Shortest recording; models need some windows of 0.025 s", above=0
    )
    resample: bool = RESAMPLE


class AudioClassification(Task):
    """Recordings with a label: a folder with one folder for each class, or rows with the path of a recording."""

    name = "audio_classification"
    summary = (
        "a folder with one folder of recordings for each class, or rows with a path and a label"
    )
    auto_class = "AutoModelForAudioClassification"
    distils = "same"
    columns: ClassVar[dict[str, str]] = {
        "audio": "path of a recording",
        "label": "the name or number of the class",
    }
    Options = Options
    metric_names = ("accuracy", "f1")
    best_metric = "accuracy"
    processor = "audio"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_resampling(setting.options.resample)

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {label_name(row["label"])} if row.get("label") not in (None, "") else set()

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        return sorted_labels(names)

    def model_arguments(self) -> dict[str, Any]:
        # A layer that is skipped would get no gradient in that step.
        skips = {"layerdrop": 0.0} if hasattr(self.setting.config, "layerdrop") else {}
        return super().model_arguments() | skips

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        label = number_of_label(row.get("label"), self.setting.labels)
        rate, options = self.setting.tokenizer.sampling_rate, self.setting.options
        longest = options.max_seconds
        seconds = length_of(row.get("audio"), rate, options.resample) / rate
        if seconds > longest:
            raise BadRow(
                f"{row['audio']} has {seconds:.1f} s, more than task.max_seconds={longest:g}; cut it, or raise max_seconds if the model's "
                "feature extractor takes longer recordings"
            )
        if seconds < self.setting.options.min_seconds:
            raise BadRow(
                f"{row['audio']} has {seconds:.3f} s, less than task.min_seconds={self.setting.options.min_seconds:g}; remove it, or add "
                "silence"
            )
        return [Encoded({"audio": row["audio"], "labels": label}, 1, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        extractor = self.setting.tokenizer
        # Feature extractors that make spectrograms pad them to one length by themselves.
        padding = {"padding": True} if extractor.model_input_names[0] == "input_values" else {}
        padding = {} if hasattr(extractor, "num_mel_bins") else padding
        found = extractor(
            [read_sound(row["audio"], extractor.sampling_rate) for row in rows],
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            **padding,
        )
        return dict(found) | {"labels": torch.tensor([row["labels"] for row in rows])}

    def render(self, features: dict[str, Any]) -> str:
        return f"{features['audio']} -> «{self.setting.labels[features['labels']]}»"

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, labels), "f1": macro_f1(predictions, labels)}


TASK = AudioClassification
