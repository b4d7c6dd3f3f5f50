"""Small tokenizers of the kinds that GGUF describes, trained on a few sentences."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftkit.export.vocabulary import SPLITS

CORPUS = [
    "The quick brown fox jumps over 13 lazy dogs; then it sleeps, and it's fine.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n",
    "Über Cafés spricht man gern: “Bonjour, 你好!” 2024 20245",
] * 4
TEXTS = [
    *CORPUS[:3],
    "  two spaces",
    "12345 678",
    "don't I'LL",
    "🙂 unknown",
    "a\n\n\nb",
    "x<|end|>y",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]


def byte_level(split: str, size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer.

    Args:
        split: llama.cpp's name for the way text is split.
        size: Number of tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    patterns = {name: pattern for pattern, name in SPLITS.items()}
    if split == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(patterns[split]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2])


def sentencepiece(size: int = 450) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as converted from SentencePiece: spaces are "▁", and unknown characters become bytes."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    import json

    described = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in described["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=described["vocab"],
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer of a kind that is not exported."""
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return _wrapped(backend, unk_token="<unk>")


def _wrapped(backend, **special) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
