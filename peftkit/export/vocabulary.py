"""A tokenizer as GGUF metadata: tokens, merges or scores, special tokens, the way text is split, and the chat template."""

from __future__ import annotations

import json
from typing import Any

from peftkit.errors import ContractError
from peftkit.export.families import require_gguf

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _END: "llama-bpe",
    _WORDS + r"\p{N}" + _END: "qwen2",
    _CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""llama.cpp's name for a pattern with which a tokenizer splits text before it merges: Llama 3, Qwen 2 and 3, Mistral Nemo."""


def add_tokenizer(
    writer: Any,
    tokenizer: Any,
    vocab_size: int,
    pre_tokenizer: str | None = None,
    eos_ids: Any = None,
) -> None:
    """Write a tokenizer.

    Args:
        writer: A ``gguf.GGUFWriter``.
        tokenizer: A tokenizer of transformers with a backend of the tokenizers library.
        vocab_size: Rows of the model's embedding. Ids without a token become unused tokens.
        pre_tokenizer: llama.cpp's name for the way text is split. Default: recognised from the tokenizer.
        eos_ids: The ids at which the model stops, from its generation config.

    Raises:
        ContractError: The tokenizer is of a kind that GGUF does not describe, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ContractError(
            f"tokenizer: {type(tokenizer).__name__} has no backend of the tokenizers library; load it with AutoTokenizer"
        )
    if len(tokenizer) > vocab_size:
        raise ContractError(
            f"tokenizer: it has {len(tokenizer)} tokens, but the model's embedding has {vocab_size} rows; call "
            "model.resize_token_embeddings(len(tokenizer)) before training"
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ContractError(
            f"tokenizer: its model is {model['type']}; byte-level BPE and SentencePiece BPE can be exported"
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, kinds = _tokens(tokenizer, vocab_size, model)
    if _is_byte_level(described):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or split_name(described))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in m) for m in merges])
        writer.add_add_space_prefix(_prefixes_space(described))
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre_tokenizer or "default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(_prefixes_space(described))
    else:
        raise ContractError(
            "tokenizer: its BPE model is neither byte-level nor has it a token for each byte (byte_fallback), which GGUF needs"
        )
    _add_special(writer, tokenizer, eos_ids)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)


def split_name(described: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits text.

    Args:
        described: The content of ``tokenizer.json``.

    Raises:
        ContractError: No name of llama.cpp is known for it.
    """
    pre = described.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise ContractError(
        "tokenizer: no name of llama.cpp is known for the way it splits text (pre_tokenizer of tokenizer.json); pass "
        "pre_tokenizer, one of the names in llama.cpp's src/llama-vocab.cpp"
    )


def _is_byte_level(described: dict[str, Any]) -> bool:
    pre = described.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in pre.get("pretokenizers", [pre]))


def _prefixes_space(described: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if a space preceded it."""
    pre = described.get("pre_tokenizer") or {}
    normalizer = described.get("normalizer") or {}
    for step in pre.get("pretokenizers", [pre]):
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
        if step.get("type") == "ByteLevel":
            return bool(step.get("add_prefix_space"))
    return any(s.get("type") == "Prepend" for s in normalizer.get("normalizers", [normalizer]))


def _tokens(tokenizer: Any, vocab_size: int, model: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types."""
    types = require_gguf().TokenType
    added = tokenizer.added_tokens_decoder
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", types.UNUSED
        elif index in added and added[index].special:
            kind = types.UNKNOWN if token == model.get("unk_token") else types.CONTROL
        elif index in added:
            kind = types.USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = types.BYTE
        else:
            kind = types.NORMAL
        tokens.append(token)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores that order the merges as the tokenizer does: SentencePiece merges the pair with the highest score first."""
    first = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), -float(rank))
    lowest = -float(len(merges))
    return [first.get(token, lowest) for token in tokens]


def _add_special(writer: Any, tokenizer: Any, eos_ids: Any) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("sep", writer.add_sep_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            add(index)
    stops = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
    others = [index for index in stops if index != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    encoded = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and encoded[:1] == [bos])
    writer.add_add_eos_token(eos is not None and len(encoded) > 1 and encoded[-1] == eos)
