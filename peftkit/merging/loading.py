"""Load a base model and an adapter from folders, as the adapter needs them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from peftkit.base.files import open_checkpoint
from peftkit.base.kinds import QUANTISED, stored_kind
from peftkit.base.load import load_base
from peftkit.errors import ContractError, short
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.loading import load_adapter
from peftkit.merging.extras import folder_of, has_tokenizer
from peftkit.merging.mapped import BaseFiles, attach, files_of, load_mapped
from peftkit.rollback import writes_base_weights

_HEAD = re.compile(r"\.(score|classifier)\.(?:\w+\.)*weight$")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def load_for_merging(adapter: Path, base: str | None = None, quantize: str | None = None) -> Any:
    """Load a base model and put an adapter on it.

    The weights of the base model stay in its files (``load_mapped``) if this is possible. Otherwise they are loaded, and
    ``files_of(model.get_base_model()).note`` has the reason. Quantised models are loaded by ``load_base``, which also reads and makes stacks of
    experts in 4 bits.

    The embeddings are resized if the adapter has those of a larger or smaller vocabulary, and a classifier gets the number of labels of the
    adapter's.

    Args:
        adapter: Folder of the adapter.
        base: Folder or hub id of the base model. Default: the one in the adapter's config.
        quantize: ``"nf4"`` or ``"int8"``, or ``None`` to load the model as it was saved.

    Returns:
        A ``PeftModel`` in evaluation mode.

    Raises:
        ContractError: The base model is not known or cannot be loaded, or the adapter does not fit it.
        ValueError: ``quantize`` is unknown.
    """
    import transformers

    checkpoint = read_checkpoint(adapter)
    name = base or checkpoint.config.get("base_model_name_or_path")
    if not name:
        raise ContractError(
            f"{adapter}/adapter_config.json does not name the base model; give its folder or hub id as BASE"
        )
    if quantize not in (None, *QUANTISED):
        raise ValueError(f"quantize={quantize!r} is unknown; pass 'nf4' or 'int8'")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        labels = _labels(checkpoint)
        if labels is not None:
            config.num_labels = labels
        loader = _loader(config, checkpoint)
        changes = {} if labels is None else {"num_labels": labels}
        obstacle = _obstacle(checkpoint, config, quantize)
        if obstacle is None:
            try:
                model = load_mapped(name, loader, **changes)
            except ContractError as error:
                obstacle = " ".join(str(error).split())[:300]
        if obstacle is not None:
            if (quantize or stored_kind(config) in QUANTISED) and _has_safetensors(name):
                model = load_base(name, quantize or "auto", auto_class=loader, **changes)
            else:
                settings = {"dtype": "auto", "quantization_config": _quantization(quantize)}
                model = loader.from_pretrained(name, config=config, **settings)
            attach(model, BaseFiles(f"{name}, loaded into memory as a whole: {obstacle}"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ContractError(f"the base model {short(name)} cannot be loaded: {reason}") from error
    _fit_vocabulary(model, checkpoint)
    # the fused forwards would be removed again for the comparison
    merging = load_adapter(model, adapter, accelerate=False)
    files_of(model).release()
    return merging


def tokenizer_folder(adapter: Path, model: Any) -> Path | None:
    """The folder that has the tokenizer: the adapter's, else the base model's, else ``None``."""
    if has_tokenizer(adapter):
        return adapter
    folder = folder_of(model.get_base_model())
    return folder if folder is not None and has_tokenizer(folder) else None


def _has_safetensors(name: str) -> bool:
    try:
        open_checkpoint(name, {})
    except ContractError:
        return False
    return True


def _quantization(quantize: str | None) -> Any:
    """The config by which transformers quantises the pickle files of a model."""
    if quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def _obstacle(checkpoint: Checkpoint, config: Any, quantize: str | None) -> str | None:
    """Why the weights of the base model cannot stay in its files, or ``None``."""
    if quantize is not None:
        return f"it is quantised to {quantize}"
    stored = stored_kind(config)
    if stored is not None:
        return f"its weights are quantised ({stored})"
    if writes_base_weights(SimpleNamespace(**checkpoint.config)):
        return f"init_lora_weights={checkpoint.config['init_lora_weights']!r} changes its weights"
    return None


def _labels(checkpoint: Checkpoint) -> int | None:
    """The number of labels of the adapter's classifier."""
    sizes = [t.shape[0] for key, t in checkpoint.tensors.items() if _HEAD.search(key)]
    has_labels = checkpoint.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    return sizes[-1] if sizes and has_labels else None


def _loader(config: Any, checkpoint: Checkpoint) -> Any:
    import transformers

    task = checkpoint.config.get("task_type")
    if task in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task])
    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModel


def _fit_vocabulary(model: Any, checkpoint: Checkpoint) -> None:
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except NotImplementedError:  # models without token embeddings
        return
    name = next((n for n, module in model.named_modules() if module is embeddings), None)
    saved = checkpoint.tensors.get(f"base_model.model.{name}.weight")
    if saved is not None and saved.shape[0] != embeddings.weight.shape[0]:
        model.resize_token_embeddings(saved.shape[0], mean_resizing=False)
