"""Speech recognition and translation with an encoder-decoder, such as Whisper: a recording in, a text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from peftkit.errors import ContractError, short
from peftkit.finetune.schema import key
from peftkit.finetune.sound import length_of, read_sound, require_resampling
from peftkit.finetune.tasks.base import IGNORED, BadRow, Encoded, Setting, Task, pad, text_of
from peftkit.finetune.transcripts import TextOptions, changed_text, error_rates
from peftkit.finetune.whisper_prompt import set_prompt, write_prompt

if TYPE_CHECKING:
    import torch

LEAST_SAMPLES = {"whisper": 1, "moonshine": 895, "speech_to_text": 800}
"""Kinds of models whose labels and inputs are known, and the samples that the shortest recording needs.

Moonshine's convolutions (kernels 127, 7 and 3, strides 64, 3 and 2) then give one frame, and two windows of Speech2Text fit, which it
normalises.
"""


@dataclass
class Options(TextOptions):
    """Options of ``speech_seq2seq``."""

    language: str | None = key(
        None, "Language of the recordings, such as german or de; for multilingual Whisper"
    )
    task: Literal["transcribe", "translate"] = key(
        "transcribe", "translate: the texts are English translations; for multilingual Whisper"
    )


class SpeechSeq2Seq(Task):
    """Recordings with their texts. The decoder gets the labels of transformers' own recipe, and evaluations compare what it writes.

    Source: Radford et al., 2022, arXiv:2212.04356 (Whisper).
    """

    name = "speech_seq2seq"
    summary = "recordings with their texts or translations, for Whisper and its relatives"
    auto_class = "AutoModelForSpeechSeq2Seq"
    columns: ClassVar[dict[str, str]] = {"audio": "path of a recording", "text": "what is said"}
    Options = Options
    metric_names = ("wer", "cer")
    lower_is_better = ("loss", "wer", "cer")
    generative = True
    answers_audio = True
    writes_in_evaluation = True
    seq_len = 448
    processor = "speech and text"
    example_model = "openai/whisper-small"
    # The Trainer's smoothing takes the labels away, from which the model makes the inputs of its decoder.
    smooths_labels = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_resampling(setting.options.resample)
        self.config, self.extractor = setting.config, setting.processor.feature_extractor
        self.kind = getattr(self.config, "model_type", None)
        if self.kind not in LEAST_SAMPLES:
            raise ContractError(
                f"task={self.name} trains models of the kinds {', '.join(LEAST_SAMPLES)}, and this one is a {self.kind}; for models with a CTC "
                "head use task=speech_ctc"
            )
        if getattr(self.extractor, "dither", 0.0):
            raise ContractError(
                f"the feature extractor adds noise (dither={self.extractor.dither:g}), which would be other noise after a run is resumed; set "
                "dither to 0 in its preprocessor_config.json"
            )
        self.rate = self.extractor.sampling_rate
        self.is_whisper = self.kind == "whisper"
        if self.is_whisper:
            set_prompt(setting.tokenizer, setting.options.language, setting.options.task)
        elif setting.options.language is not None or setting.options.task != "transcribe":
            raise ContractError(
                f"task.language={short(setting.options.language)} and task.task={setting.options.task!r} are for Whisper, and this is a "
                f"{self.kind}; remove them"
            )
        self.start = self.config.decoder_start_token_id
        self.prompt_ids = self._prompt()
        self.dtype: torch.dtype | None = None

    def _prompt(self) -> list[int]:
        """The tokens before each text, with that which starts the decoder."""
        found = list(self.setting.tokenizer("").input_ids)
        if found[-1:] == [self.setting.tokenizer.eos_token_id]:
            found.pop()
        if self.is_whisper and found[:1] != [self.start]:
            raise ContractError(
                f"the tokenizer's texts start with the token {found[:1]}, but decoder_start_token_id={self.start} in the model's config; the "
                "two belong to different models"
            )
        return found if found[:1] == [self.start] else [self.start, *found]

    def model_arguments(self) -> dict[str, Any]:
        # A layer that is skipped would get no gradient in that step.
        names = ("encoder_layerdrop", "decoder_layerdrop")
        return {name: 0.0 for name in names if hasattr(self.config, name)}

    def fit_model(self, model: Any) -> None:
        import torch

        # The features must have the dtype of the convolutions that get them.
        self.dtype = next(m.weight.dtype for m in model.modules() if isinstance(m, torch.nn.Conv1d))
        if self.is_whisper:
            write_prompt(model, self.setting.tokenizer)
            # Sinusoids, which the class keeps fixed; transformers 5 forgets this when it loads a checkpoint.
            model.get_encoder().embed_positions.requires_grad_(False)

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        options = self.setting.options
        text = changed_text(text_of(row, "text"), options)
        if not text.strip():
            raise BadRow("no character is left of the text")
        labels = self._labels(text)
        self._require_length(row.get("audio"))
        size = self.setting.seq_len
        features = {"audio": row["audio"], "text": text, "labels": labels[:size]}
        # The prompt is supervised too, but without any token of the text there is nothing to learn.
        shown = len(self.prompt_ids) - 1
        return [
            Encoded(features, len(labels), len(features["labels"]) if len(labels) > shown else 0)
        ]

    def _labels(self, text: str) -> list[int]:
        """The prompt, the text and the end, without the token that starts the decoder: the model puts it before the labels."""
        tokenizer = self.setting.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        special = [i for i in ids if i in set(tokenizer.all_special_ids)]
        if special:
            names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(set(special)))))
            raise BadRow(
                f"the text has the special tokens {names}, or characters that the vocabulary does not have; remove them (task.remove)"
            )
        return [*self.prompt_ids[1:], *ids, tokenizer.eos_token_id]

    def _require_length(self, path: Any) -> None:
        options = self.setting.options
        samples = length_of(path, self.rate, options.resample)
        seconds = samples / self.rate
        if samples < LEAST_SAMPLES[self.kind]:
            raise BadRow(
                f"{path} has {samples} samples, and the model needs {LEAST_SAMPLES[self.kind]}; remove it, or add silence"
            )
        if seconds > options.max_seconds:
            raise BadRow(
                f"{path} has {seconds:.1f} s, more than task.max_seconds={options.max_seconds:g}; split it with its text"
            )
        window = getattr(self.extractor, "n_samples", None)
        if window is not None and samples > window:
            raise BadRow(
                f"{path} has {seconds:.1f} s, but the model hears {window / self.rate:g} s at a time; split it with its text"
            )

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = pad([row["labels"] for row in rows], IGNORED, 1)
        return self._features([row["audio"] for row in rows]) | {"labels": labels}

    def _features(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the feature extractor makes of recordings, with a mask of what is padding if the model needs it."""
        import torch

        masks = not self.is_whisper or getattr(self.config, "apply_spec_augment", False)
        found = self.extractor(
            [read_sound(path, self.rate) for path in paths],
            sampling_rate=self.rate,
            padding="max_length" if self.is_whisper else True,
            return_attention_mask=masks,
            return_tensors="pt",
        )
        found = {name: value for name, value in found.items() if masks or name != "attention_mask"}
        for name, values in found.items():
            if not values.is_floating_point():
                continue
            for path, value in zip(paths, values, strict=True):
                if not bool(torch.isfinite(value).all()):
                    raise ContractError(
                        f"{type(self.extractor).__name__} makes numbers that are not finite of {path}; is it silent? Remove it"
                    )
            found[name] = values.to(self.dtype or values.dtype)
        return found

    def render(self, features: dict[str, Any]) -> str:
        return f"{features['audio']} -> «{self.setting.tokenizer.decode(features['labels'])}»"

    def written(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        # As many tokens as labels may have.
        return self._write(model, given, self.setting.seq_len + 1 - len(self.prompt_ids))

    def _write(
        self, model: Any, inputs: dict[str, Any], max_new_tokens: int, temperature: float = 0.0
    ) -> torch.Tensor:
        """Token ids after the prompt, with the model's own ``generate``."""
        import torch

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        longest = getattr(self.config, "max_target_positions", None) or self.setting.seq_len + 1
        settings: dict[str, Any] = {
            "max_new_tokens": min(max_new_tokens, longest - len(self.prompt_ids)),
            "do_sample": temperature > 0,
            "num_beams": 1,
            "use_cache": True,
        }
        if temperature > 0:
            settings["temperature"] = temperature
        if self.is_whisper:
            settings["return_timestamps"] = False
        if not self.is_whisper:
            rows = len(next(iter(inputs.values())))
            device = next(base.parameters()).device
            settings["decoder_input_ids"] = torch.tensor([self.prompt_ids] * rows, device=device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return model.generate(**inputs, **settings)
        finally:
            model.train(was_training)

    def scores(self, rows: Any, predictions: Any, labels: Any) -> dict[str, float]:
        found = [self._text(ids) for ids in np.asarray(predictions)]
        return error_rates(found, list(rows["text"]))

    def _text(self, ids: Any) -> str:
        kept = [int(i) for i in ids if i != IGNORED]
        return self.setting.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        return self.prompt_ids, changed_text(text_of(row, "text"), self.setting.options)

    def question(self, row: dict[str, Any], ids: list[int]) -> str:
        return row["audio"]

    def context(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self._features([row["audio"]])

    def prompt_of_audio(self, path: str) -> tuple[list[int], dict[str, torch.Tensor]]:
        self._require_length(path)
        return self.prompt_ids, self._features([path])

    def answer(
        self,
        model: Any,
        ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        context: dict[str, torch.Tensor] | None = None,
    ) -> str:
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in (context or {}).items()}
        return self._text(self._write(model, inputs, max_new_tokens, temperature)[0])


TASK = SpeechSeq2Seq
