"""Tokenizers in a GGUF file: the metadata, and the same token ids when transformers reads them back."""

import export_cases
import models
import pytest
import transformers as hf
from gguf import GGUFReader, TokenType

from peftkit import ContractError, export_gguf
from peftkit.export.vocabulary import split_name


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def exported(tmp_path, tokenizer, vocab_size=None, **arguments):
    model = models.tiny("llama")
    model.resize_token_embeddings(vocab_size or len(tokenizer))
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer, dtype="f32", **arguments)
    return {
        name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()
    }


def read_back(tmp_path):
    return hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers_have_the_same_ids(split, tmp_path):
    tokenizer = export_cases.byte_level(split)
    fields = exported(tmp_path, tokenizer)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == split
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [TokenType.CONTROL] * 3
    assert set(kinds[3:]) == {TokenType.NORMAL}
    again = read_back(tmp_path)
    for text in export_cases.TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    for name in ("bos", "eos", "pad"):
        assert getattr(again, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == "user: Hi\n"
    assert fields["tokenizer.chat_template"] == export_cases.TEMPLATE


def test_digits_one_by_one_have_smollms_name(tmp_path):
    assert exported(tmp_path, export_cases.byte_level("smollm"))["tokenizer.ggml.pre"] == "smollm"


def test_sentencepiece_tokenizers_have_the_same_ids(tmp_path):
    tokenizer = export_cases.sentencepiece()
    fields = exported(tmp_path, tokenizer)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    tokens = fields["tokenizer.ggml.tokens"]
    assert kinds[tokens.index("<0x0A>")] == TokenType.BYTE
    again = read_back(tmp_path)
    for text in export_cases.TEXTS[:-1]:
        assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"], text  # fmt: skip


def test_added_tokens_gaps_and_stops(tmp_path):
    tokenizer = export_cases.byte_level("gpt-2")
    tokenizer.add_tokens(["<tool>"])
    fields = exported(tmp_path, tokenizer, vocab_size=len(tokenizer) + 3)
    count = len(tokenizer)
    assert fields["tokenizer.ggml.tokens"][count - 1 :] == ["<tool>", *(f"[PAD{count + i}]" for i in range(3))]  # fmt: skip
    assert fields["tokenizer.ggml.token_type"][count - 1 :] == [TokenType.USER_DEFINED] + [TokenType.UNUSED] * 3  # fmt: skip
    assert fields["llama.vocab_size"] == count + 3
    assert fields["tokenizer.ggml.add_bos_token"] is False
    # the tiny model stops at id 2, the tokenizer's own end of text
    assert "tokenizer.ggml.eot_token_id" not in fields


def test_a_second_stop_and_a_first_token_are_written(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = export_cases.byte_level("llama-bpe")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    model = models.tiny("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [2, 7]
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 7
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_what_gguf_does_not_describe_is_refused(tmp_path):
    with pytest.raises(ContractError, match="its model is Unigram; byte-level BPE"):
        exported(tmp_path, export_cases.unigram(), vocab_size=96)
    tokenizer = export_cases.byte_level("gpt-2")
    with pytest.raises(ContractError, match=r"\d+ tokens, but the model's embedding has 96 rows"):
        exported(tmp_path, tokenizer, vocab_size=96)
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )
    with pytest.raises(ContractError, match="pass pre_tokenizer, one of the names"):
        exported(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert exported(tmp_path, tokenizer, pre_tokenizer="falcon")["tokenizer.ggml.pre"] == "falcon"
    with pytest.raises(ContractError, match=r"no name of llama\.cpp is known"):
        split_name({"pre_tokenizer": None})
    with pytest.raises(ContractError, match="has no backend of the tokenizers library"):
        exported(tmp_path, [1], vocab_size=96)
