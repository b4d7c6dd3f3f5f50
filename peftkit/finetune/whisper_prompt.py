"""The tokens with which Whisper's texts start: language, task and no timestamps, in the tokenizer and in the generation config."""

from __future__ import annotations

from typing import Any

from peftkit.errors import ContractError, short

_FIXED = ("<|startoftranscript|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>")


def set_prompt(tokenizer: Any, language: str | None, task: str) -> None:
    """Let the tokenizer put the tokens of language and task before each text. They are saved with it.

    Args:
        tokenizer: Whisper's tokenizer.
        language: Name or code of a language; ``None`` keeps the tokenizer's own, if it has one.
        task: ``"transcribe"`` or ``"translate"``. Models for English alone, which have no language, have no task either.

    Raises:
        ContractError: Whisper or this tokenizer does not know the language, or a task needs one.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    language = language or tokenizer.language
    if language is None:
        if task != "transcribe":
            raise ContractError(
                f"task.task={task!r} needs the language of the recordings; set task.language"
            )
        tokenizer.task = None
        tokenizer.set_prefix_tokens(predict_timestamps=False)
        return
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    token = f"<|{code}|>"
    if code not in TO_LANGUAGE_CODE.values() or token not in tokenizer.get_vocab():
        known = sorted(
            name
            for name, code in TO_LANGUAGE_CODE.items()
            if f"<|{code}|>" in tokenizer.get_vocab()
        )
        raise ContractError(
            f"task.language={short(language)} is no language that the model's tokenizer has a token for; it has {', '.join(known) or 'none'}"
        )
    tokenizer.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
    # Only these values are saved in tokenizer_config.json.
    chosen = {"language": tokenizer.language, "task": task, "predict_timestamps": False}
    tokenizer.init_kwargs.update(chosen)
    # transformers counts from the first token instead of looking for the name.
    found = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)
    wanted = ["<|startoftranscript|>", token, f"<|{task}|>", "<|notimestamps|>"]
    if found != wanted:
        raise ContractError(
            f"the tokens of the tokenizer are not in Whisper's order: texts would start with {''.join(found)} instead of {''.join(wanted)}; "
            "use the tokenizer of the checkpoint"
        )


def write_prompt(model: Any, tokenizer: Any) -> None:
    """Let ``model.generate`` start as the tokenizer's texts do, so that a saved model needs no further arguments.

    Raises:
        ContractError: A multilingual model has no language, or a model for English alone has one.
    """
    own = model.generation_config
    many = getattr(own, "is_multilingual", hasattr(own, "lang_to_id"))
    language, task = tokenizer.language, tokenizer.task
    if many and language is None:
        raise ContractError(
            "the model is multilingual, so its texts start with a language and a task; set task.language to that of the recordings, such as "
            "task.language=english"
        )
    if not many and language is not None and hasattr(own, "is_multilingual"):
        raise ContractError(
            f"task.language={short(language)}, but the model is for English alone (is_multilingual is false in its generation config); remove "
            "it"
        )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _FIXED}
    # What older checkpoints have instead of language and task.
    for config in (own, model.config):
        if getattr(config, "forced_decoder_ids", None) is not None:
            config.forced_decoder_ids = None
    # Otherwise it would be made from the model's config again when a saved model is loaded.
    own._from_model_config = False
    own.no_timestamps_token_id = ids["<|notimestamps|>"]
    own.decoder_start_token_id = ids["<|startoftranscript|>"]
    own.return_timestamps = False
    own.language, own.task = language, task if language is not None else None
    own.is_multilingual = language is not None
    if language is None:
        return
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    vocabulary = tokenizer.get_vocab()
    names = (f"<|{code}|>" for code in LANGUAGES)
    own.lang_to_id = {name: vocabulary[name] for name in names if name in vocabulary}
    own.task_to_id = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
