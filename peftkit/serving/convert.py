"""Rewrite an adapter's folder so that more servers read it: names, layout of experts, one rank and one scale."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from peftkit.adapter_files import CONFIG_FILE, reading
from peftkit.errors import ContractError
from peftkit.interop.files import read_checkpoint
from peftkit.serving.expert_layouts import (
    Form,
    Names,
    leaf_names,
    pad,
    stack,
    to_one_pair_per_expert,
    to_stacked,
    unstack,
)
from peftkit.serving.rows import Key, module_rank, module_scale

WEIGHTS_FILE = "adapter_model.safetensors"
_WRAPPER = re.compile(
    r"(?<=\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def convert_adapter(
    adapter: str | Path,
    out_dir: str | Path,
    *,
    experts: Literal["per-expert", "stacked"] | None = None,
    uniform: bool = False,
    base: str | None = None,
) -> Path:
    """Write an adapter that computes the same in another form. The original is unchanged.

    Keys are always written as PEFT writes them. The product ``scaling · lora_B lora_A`` of every module stays the same: layouts
    and ranks change by moving values and adding zeros; only modules whose scale differs from the most common one are
    multiplied, with one rounding in the dtype of ``lora_B`` (none if the ratio is a power of two).

    Args:
        adapter: Folder of a LoRA adapter saved by PEFT or peftkit.
        out_dir: Folder to write. It must not exist; it appears only when it is complete.
        experts: ``per-expert`` writes one pair for each expert (vLLM for most models, SGLang), with one rank and one scale;
            ``stacked`` writes PEFT's ``target_parameters``. ``None`` keeps the layout.
        uniform: Write one rank and one scale for all modules, without rsLoRA, ``rank_pattern`` and ``alpha_pattern``.
        base: Folder or hub id of the base model, for ``experts``; only its config is read. Default: the one in the config.

    Returns:
        ``out_dir``.

    Raises:
        ContractError: The adapter is not a plain LoRA, has no experts in the other layout, or ``out_dir`` exists.
        ValueError: ``experts`` has another value, or transformers does not know the config of ``base``.
    """
    out = Path(out_dir)
    if experts not in (None, "per-expert", "stacked"):
        raise ValueError(f"experts={experts!r} is unknown; use 'per-expert', 'stacked' or None")
    if out.exists() or out.is_symlink():
        raise ContractError(f"out_dir={str(out)!r} exists; choose another folder, or remove it")
    checkpoint = read_checkpoint(adapter)
    config = dict(checkpoint.config)
    if config.get("peft_type") != "LORA":
        raise ContractError(
            f"{checkpoint.folder} holds {config.get('peft_type', 'an adapter of another library')}, not LoRA; only LoRA can be rewritten"
        )
    tensors = _renamed(checkpoint.tensors)
    forms: dict[str, Form] = {}
    if experts is not None:
        names = Names.of(_model_type(base or config.get("base_model_name_or_path")))
        if experts == "per-expert":
            config, tensors, forms = to_one_pair_per_expert(config, tensors, names)
        else:
            config, tensors = to_stacked(config, tensors, names)
    if uniform or experts == "per-expert":
        config, tensors = _uniform(config, tensors, forms)
    _write(checkpoint.folder, out, config, tensors)
    return out


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the keys that PEFT writes: its prefix, no wrappers, no adapter's name."""
    renamed = {}
    for name, tensor in tensors.items():
        key = Key.parse(name)
        if not key.role:
            new = name
        else:
            module = _WRAPPER.sub("", f".{key.module}")[1:]
            parts = key.rest.split(".")
            tail = f".{parts[-1]}" if parts[-1] in ("weight", "bias") else ""
            new = f"base_model.model.{module}.{key.role}{tail}"
        if new in renamed:
            raise ContractError(
                f"{name}: two tensors of the adapter would be called {new}; save one adapter in one folder"
            )
        renamed[new] = tensor
    return renamed


def _model_type(base: str | None) -> str:
    import transformers

    if base is None:
        raise ContractError(
            "base=None: the adapter does not record its base model; pass base (--base)"
        )
    try:
        return transformers.AutoConfig.from_pretrained(base).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={base!r} is neither a folder with a config.json nor a model on the hub ({' '.join(str(error).split())[:200]})"
        ) from error


def _uniform(
    config: dict[str, Any], tensors: dict[str, Tensor], forms: dict[str, Form]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write one rank and one scale for all modules.

    Args:
        config: Content of ``adapter_config.json``.
        tensors: Tensors with PEFT's keys.
        forms: Ranks and scales of modules for which the config does not have them.
    """
    for field in ("use_dora", "lora_bias", "use_qalora", "use_bdlora"):
        if config.get(field):
            raise ContractError(
                f"{field}={config[field]!r}: only plain LoRA can be written with one rank and one scale; merge the adapter instead"
            )
    factors = [key for key in map(Key.parse, tensors) if key.role.endswith("_A")]
    forms = {key.module: forms.get(key.module) or _form(config, key, tensors) for key in factors}
    if not forms:
        raise ContractError("the adapter has no factors of LoRA (lora_A, lora_B)")
    scale, _ = Counter(form.scale for form in forms.values()).most_common(1)[0]
    rank = max(form.rank for form in forms.values())
    out = dict(tensors)
    for key in factors:
        other = key.name.replace("_A.weight", "_B.weight").replace("embedding_A", "embedding_B")
        if other not in tensors:
            raise ContractError(f"{key.name} has no counterpart {other}; save the adapter again")
        pair = (tensors[key.name], tensors[other])
        if key.is_stack:
            pair = stack([pad(one, rank) for one in unstack(pair, forms[key.module].rank)])
        else:
            pair = pad(pair, rank)
        ratio = forms[key.module].scale / scale
        out[key.name] = pair[0]
        out[other] = pair[1] if ratio == 1 else (pair[1].float() * ratio).to(pair[1].dtype)
    alpha = scale * rank
    alpha = int(alpha) if alpha == int(alpha) else alpha
    new = config | {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    if isinstance(config.get("target_modules"), str):
        new["target_modules"] = sorted(leaf_names(tensors))
    assert math.isclose(alpha / rank, scale)
    return new | {"use_rslora": False}, out


def _form(config: dict[str, Any], key: Key, tensors: dict[str, Tensor]) -> Form:
    """The rank and scale that the config gives to a module."""
    rank = module_rank(config, key.module) if key.is_stack else tensors[key.name].shape[0]
    return Form(rank, module_scale(config, key.module))


def _write(source: Path, out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the folder under a temporary name next to ``out``, with the other files of the original, and rename it."""
    from safetensors.torch import save_file

    with reading(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                shutil.copy2(file, partial / file.name)
        kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(kept, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
