"""Supervised fine-tuning on conversations: the loss is on the answers only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from peftkit.errors import ContractError, short
from peftkit.finetune.generative import CausalTask
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import IGNORED, BadRow, Encoded, Setting, text_of

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@dataclass
class Options:
    """Options of ``sft``."""

    train_on: Literal["answers", "last_answer", "everything"] = key(
        "answers", "Which tokens the loss is computed on"
    )
    packing: bool = key(False, "Put several rows in one, without attention between them")
    chat_template: str | None = key(
        None, "A file with a Jinja template, instead of the tokenizer's own"
    )
    system: str | None = key(None, "System message of rows without one")


class Sft(CausalTask):
    """Answers of conversations."""

    name = "sft"
    summary = "conversations or prompts with answers; loss on the answers"
    columns: ClassVar[dict[str, str]] = {
        "messages": "a list of {role, content}",
        "prompt": "the request, instead of messages",
        "completion": "the answer to prompt",
        "system": "a system message (optional)",
    }
    Options = Options
    seq_len = 1024
    distils = "next"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        file = setting.options.chat_template
        if file is not None:
            if not Path(file).is_file():
                raise ContractError(
                    f"task.chat_template={short(file)} is no file; give a file with a Jinja template"
                )
            setting.tokenizer.chat_template = Path(file).read_text(encoding="utf-8")

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        options = self.setting.options
        ids, labels = self.tokens_of(_messages(row, options.system), options.train_on)
        return _cut(ids, labels, self.setting.seq_len)

    def tokens_of(
        self, messages: list[dict[str, str]], train_on: str
    ) -> tuple[list[int], list[int]]:
        """The token ids of a conversation, and the labels of what ``train_on`` names."""
        text, spans = self._text(messages, train_on)
        found = self.setting.tokenizer(
            text, add_special_tokens=not self._has_template, return_offsets_mapping=True
        )
        ids = list(found["input_ids"])
        labels = [
            token
            if any(start < end and begin <= start < stop for begin, stop in spans)
            else IGNORED
            for token, (start, end) in zip(ids, found["offset_mapping"], strict=True)
        ]
        if not self._has_template:
            ids, labels = _with_end(ids, labels, self.setting.tokenizer.eos_token_id)
        return ids, labels

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        messages = _messages(row, self.setting.options.system)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return self.prompt_ids(messages[:last]), messages[last]["content"]

    def prompt_of_text(self, text: str) -> list[int]:
        return self.prompt_ids(
            with_system([{"role": "user", "content": text}], self.setting.options.system)
        )

    @property
    def _has_template(self) -> bool:
        return getattr(self._renderer, "chat_template", None) is not None

    @property
    def _renderer(self) -> Any:
        """What has the chat template."""
        return self.setting.tokenizer

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._has_template:
            return list(self.setting.tokenizer(_plain(messages)).input_ids)
        text = self._rendered(messages, add_generation_prompt=True)
        return list(self.setting.tokenizer(text, add_special_tokens=False).input_ids)

    def _text(
        self, messages: list[dict[str, str]], train_on: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and the places of the supervised parts in it."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self._has_template:
            if len(messages) > 2 + (messages[0]["role"] == "system"):
                raise BadRow(
                    "a conversation of several turns needs a chat template, and the tokenizer has none; set task.chat_template"
                )
            start, text = len(_plain(messages[:-1])), _plain(messages)
            return text, [(0 if train_on == "everything" else start, len(text))]
        text = self._rendered(messages)
        if train_on == "everything":
            return text, [(0, len(text))]
        if train_on == "last_answer":
            answers = answers[-1:]
        return text, [self._span(text, messages, index) for index in answers]

    def _span(self, text: str, messages: list[dict[str, str]], index: int) -> tuple[int, int]:
        """The place of an answer in the text, with the template's mark of its end, without what follows it."""
        before = self._rendered(messages[:index], add_generation_prompt=True)
        start = _common(before, text)
        if start < len(self._rendered(messages[:index])) and start < len(before):
            raise BadRow(
                "the chat template writes earlier turns in another way once later ones follow, so the place of an answer is not known; "
                "set task.train_on=last_answer, or task.chat_template"
            )
        through = text if index == len(messages) - 1 else self._rendered(messages[: index + 1])
        if not text.startswith(through):
            raise BadRow(
                "the chat template rewrites an answer once later turns follow; set task.train_on=last_answer, or task.chat_template"
            )
        return start, len(through.rstrip())

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        import jinja2

        if not messages:
            raise BadRow("the conversation starts with an answer; it needs a user's message first")
        try:
            return self._renderer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the conversation ({error})") from error


def _messages(row: dict[str, Any], system: str | None) -> list[dict[str, str]]:
    """The conversation of a row, checked."""
    if row.get("messages") is None:
        if "prompt" not in row:
            raise BadRow(
                f"neither column 'messages' nor 'prompt' and 'completion' (the row has {', '.join(map(repr, row)) or 'none'})"
            )
        messages = [
            {"role": "user", "content": text_of(row, "prompt")},
            {"role": "assistant", "content": text_of(row, "completion")},
        ]
        own = text_of(row, "system", optional=True)
        return with_system(messages, own or system)
    given = row["messages"]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise BadRow(f"column 'messages' is text, but no JSON list: {short(given)}") from None
    if not isinstance(given, (list, tuple)) or not given:
        raise BadRow(f"column 'messages' is {short(given)}; it must be a list of messages")
    messages = conversation_of(given)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no message has the role 'assistant', so there is no answer to learn")
    return messages if messages[0]["role"] == "system" else with_system(messages, system)


def conversation_of(given: Any) -> list[dict[str, str]]:
    """A list of messages, checked, with the roles system, user and assistant.

    Raises:
        BadRow: A message has no role, or no text.
    """
    return [_message(one, number) for number, one in enumerate(given, start=1)]


def _message(given: Any, number: int) -> dict[str, str]:
    if not isinstance(given, dict):
        raise BadRow(f"message {number} is {short(given)}; it must have role and content")
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not role:
        raise BadRow(
            f"message {number} has no role (it has {', '.join(map(repr, given)) or 'no keys'})"
        )
    if not isinstance(content, str):
        raise BadRow(f"message {number} has the content {short(content)}, which is not text")
    role = ROLES.get(role, role)
    if role == "assistant" and not content.strip():
        raise BadRow(f"message {number} is an empty answer")
    return {"role": role, "content": content}


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The messages with a system message before them, if there is one."""
    return [{"role": "system", "content": system}, *messages] if system else messages


def _plain(messages: list[dict[str, str]]) -> str:
    """The format of a tokenizer without a chat template: each text on its own line, the answer last."""
    if messages[-1]["role"] == "assistant":
        return _plain(messages[:-1]) + messages[-1]["content"]
    return "\n".join(message["content"] for message in messages) + "\n"


def _common(first: str, second: str) -> int:
    """Number of characters that two texts have in common at the start."""
    size = min(len(first), len(second))
    return next((i for i in range(size) if first[i] != second[i]), size)


def _with_end(ids: list[int], labels: list[int], end: int | None) -> tuple[list[int], list[int]]:
    """Add the end-of-text token, which the model must learn to write."""
    if end is None:
        return ids, labels
    if ids[-1:] == [end]:
        return ids, [*labels[:-1], end]
    return [*ids, end], [*labels, end]


def _cut(ids: list[int], labels: list[int], seq_len: int) -> list[Encoded]:
    features = {"input_ids": ids[:seq_len], "labels": labels[:seq_len]}
    # The first label has no output before it.
    supervised = sum(label != IGNORED for label in features["labels"][1:])
    return [Encoded(features, len(ids), supervised)]


TASK = Sft
