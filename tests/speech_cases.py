"""Tiny speech models with a processor in a folder, and recordings of tones, one frequency for each letter."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from typing import Any

import finetune_cases
import models
import numpy as np
import task_models
import torch
import transformers as hf

RATE = 1000
LETTERS = "abcd"
_PAIR = {
    **models.SEQ2SEQ_SIZES,
    "max_target_positions": 24,
    "init_std": 0.2,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
}
"""The sizes of an encoder with a decoder."""


def save_ctc(folder: Path, kind: str = "wav2vec2", **changes: Any) -> Path:
    """Save a tiny CTC model of the kind ``"wav2vec2"`` or ``"hubert"`` with its processor; returns the folder."""
    folder.mkdir(parents=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    tokenizer = hf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    hf.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    tiny_ctc(kind, len(tokens), **changes).save_pretrained(folder)
    return folder


def tiny_ctc(kind: str = "wav2vec2", vocab_size: int = 9, **changes: Any) -> torch.nn.Module:
    """A tiny CTC model; one output for every ten samples."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": vocab_size,
        "conv_dim": [24, 24],
        "conv_kernel": [10, 3],
        "conv_stride": [5, 2],
        "num_feat_extract_layers": 2,
        "feat_extract_norm": "layer",
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        "pad_token_id": 0,
        **dict.fromkeys(
            (
                "hidden_dropout",
                "activation_dropout",
                "attention_dropout",
                "feat_proj_dropout",
                "final_dropout",
            ),
            0.0,
        ),
    }
    config, cls = {
        "wav2vec2": (hf.Wav2Vec2Config, hf.Wav2Vec2ForCTC),
        "hubert": (hf.HubertConfig, hf.HubertForCTC),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config(**settings | changes)).train()


def write_wav(path: Path, values: Any, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """Write numbers between -1 and 1 as a WAV file of whole numbers with ``width`` bytes."""
    largest = 2 ** (8 * width - 1) - 1
    whole = np.round(np.asarray(values) * largest).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    content = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def speech(
    folder: Path, count: int = 32, rate: int = RATE, noise: float = 0.0
) -> list[dict[str, str]]:
    """Rows with recordings of one or two letters, with noise of an amplitude."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    rows = []
    for i in range(count):
        text = LETTERS[i % 4] + (LETTERS[(i // 4) % 4] if i % 3 else "")
        periods = np.arange(rate // 10) / 10
        tones = [np.sin(2 * math.pi * (1 + LETTERS.index(c)) * periods) * 0.8 for c in text]
        sound = np.concatenate(tones)
        sound += draws.uniform(-noise, noise, sound.shape)
        file = write_wav(folder / f"{i}.wav", sound, rate)
        rows.append({"audio": str(file), "text": text})
    return rows


def save_audio(folder: Path, kind: str = "wav2vec2") -> Path:
    """Save a tiny model with a feature extractor: ``"wav2vec2"``, ``"hubert"`` or ``"ast"``; returns the folder."""
    if kind == "ast":
        hf.ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=8, max_length=16).save_pretrained(
            folder
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            task_models.BUILDERS["ast audio"][0]().base_model.save_pretrained(folder)
        return folder
    hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(
        folder
    )
    tiny_ctc(kind).base_model.save_pretrained(folder)
    return folder


def sounds(folder: Path, count: int = 8, rate: int = RATE) -> Path:
    """A folder with recordings of three tones, each tone in a folder of its own."""
    for number, name in enumerate(("low", "middle", "high"), start=1):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            times = np.arange((300 + 10 * i) * rate // 1000) / rate
            tone = np.sin(2 * math.pi * rate * number * times / 8) * (0.5 + i / 20)
            write_wav(folder / name / f"{i}.wav", tone, rate=rate)
    return folder


def save_whisper(folder: Path, language: str | None = "english", **changes: Any) -> Path:
    """Save a tiny Whisper with its processor; returns the folder.

    Args:
        folder: A new folder.
        language: ``None`` makes a model for English alone.
        changes: Fields of the config.
    """
    folder.mkdir(parents=True)
    tokenizer = whisper_tokenizer()
    # The window has 1 s and 100 frames.
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    hf.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    model = tiny_whisper(len(tokenizer), **changes)
    ids = tokenizer.convert_tokens_to_ids
    own = model.generation_config
    own._from_model_config = False
    own.is_multilingual, own.no_timestamps_token_id = language is not None, ids("<|notimestamps|>")
    if language is not None:
        own.lang_to_id = {name: ids(name) for name in WHISPER_LANGUAGES}
        own.task_to_id = {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    # As the large checkpoints: not everything may be written, and no end at the start.
    own.suppress_tokens, own.begin_suppress_tokens = [ids("z")], [ids("Ġ"), tokenizer.eos_token_id]
    model.save_pretrained(folder)
    return folder


WHISPER_LANGUAGES = ["<|en|>", "<|zh|>", "<|de|>"]


def whisper_tokenizer() -> Any:
    """Whisper's tokenizer with single letters as its vocabulary."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCD?!.,", "Ġ"]
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *WHISPER_LANGUAGES,
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = hf.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def tiny_whisper(vocab_size: int, **changes: Any) -> torch.nn.Module:
    """A tiny Whisper for a window of 100 frames."""
    ends = 35
    settings = {
        "vocab_size": vocab_size,
        **_PAIR,
        "num_mel_bins": 8,
        "max_source_positions": 50,
        "pad_token_id": ends,
        "bos_token_id": ends,
        "eos_token_id": ends,
        "decoder_start_token_id": ends + 1,
        "begin_suppress_tokens": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**settings | changes)).train()


def save_moonshine(folder: Path) -> Path:
    """Save a tiny Moonshine with a processor of single letters; returns the folder."""
    folder.mkdir(parents=True)
    tokenizer = finetune_cases.letter_tokenizer()
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=True)
    hf.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    tiny_moonshine(len(tokenizer)).save_pretrained(folder)
    return folder


def tiny_moonshine(vocab_size: int) -> torch.nn.Module:
    """A tiny Moonshine."""
    config = hf.MoonshineConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.MoonshineForConditionalGeneration(config).train()


def save_speech_to_text(folder: Path) -> Path:
    """Save a tiny Speech2Text with its processor; returns the folder."""
    folder.mkdir(parents=True)
    pieces = character_pieces(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(CHARACTERS)}))
    tokenizer = hf.Speech2TextTokenizer(str(vocabulary), str(pieces))
    extractor = hf.Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)
    hf.Speech2TextProcessor(extractor, tokenizer).save_pretrained(folder)
    tiny_speech_to_text(len(tokenizer)).save_pretrained(folder)
    return folder


def tiny_speech_to_text(vocab_size: int) -> torch.nn.Module:
    """A tiny Speech2Text."""
    settings = {
        "vocab_size": vocab_size,
        **_PAIR,
        "input_feat_per_channel": 8,
        "conv_channels": 24,
        "max_source_positions": 100,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.Speech2TextConfig(**settings)
        return hf.Speech2TextForConditionalGeneration(config).train()


CHARACTERS = ("<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS)
"""The first four are those of SpeechT5 and Speech2Text."""


def character_pieces(folder: Path) -> Path:
    """The file of a sentencepiece model with ``CHARACTERS``."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcd", "dcba"] * 4),
        model_prefix=str(folder / "spm_char"),
        model_type="char",
        vocab_size=len(CHARACTERS),
        pad_id=1,
        unk_id=3,
        bos_id=0,
        eos_id=2,
        minloglevel=2,
    )
    return folder / "spm_char.model"


def save_speecht5(folder: Path, **changes: Any) -> Path:
    """Save a tiny SpeechT5 for text to speech with its processor; returns the folder."""
    folder.mkdir(parents=True)
    tokenizer = hf.SpeechT5Tokenizer(str(character_pieces(folder)))
    extractor = hf.SpeechT5FeatureExtractor(num_mel_bins=8)
    hf.SpeechT5Processor(extractor, tokenizer).save_pretrained(folder)
    tiny_speecht5(**changes).save_pretrained(folder)
    return folder


SPEAKER_SIZE = 4


def tiny_speecht5(**changes: Any) -> torch.nn.Module:
    """A tiny SpeechT5 for text to speech."""
    settings = {
        "vocab_size": 9,
        "hidden_size": 24,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "speech_decoder_prenet_units": 16,
        "speech_decoder_postnet_units": 16,
        "speech_decoder_postnet_layers": 2,
        "speaker_embedding_dim": SPEAKER_SIZE,
        "max_speech_positions": 40,
        "max_text_positions": 20,
        "reduction_factor": 2,
        **dict.fromkeys(
            (
                "hidden_dropout",
                "attention_dropout",
                "activation_dropout",
                "positional_dropout",
                "speech_decoder_postnet_dropout",
            ),
            0.0,
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.SpeechT5ForTextToSpeech(hf.SpeechT5Config(**settings | changes)).train()


def spoken(folder: Path, count: int = 16) -> list[dict[str, Any]]:
    """Rows of ``speech`` with one of two speakers."""
    rows = speech(folder, count, 16000)
    voices = np.eye(SPEAKER_SIZE)[:2] + 0.5
    return [row | {"speaker": voices[i % 2].tolist()} for i, row in enumerate(rows)]
