"""Write text with a model, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftkit.errors import ContractError
from peftkit.finetune.model import longest_input


def answer(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    context: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Generate the continuation of a prompt, or the output for an input of an encoder-decoder.

    Args:
        model: A model that can generate; its mode is restored.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompt.
        max_new_tokens: Largest number of tokens to write.
        temperature: 0 takes the most probable token each time.
        context: Inputs besides the tokens, such as pixels.

    Raises:
        ContractError: The prompt is too long for the model.
    """
    from transformers import GenerationConfig

    room = room_for(model, ids)
    if room < 1:
        raise ContractError(
            f"the prompt has {len(ids)} tokens, which fill all positions of the model; use a shorter prompt"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(base, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    settings: dict[str, Any] = {
        "max_new_tokens": min(max_new_tokens, room),
        "do_sample": temperature > 0,
        "eos_token_id": sorted(stops) or None,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": getattr(own, "bos_token_id", None),
        "decoder_start_token_id": getattr(own, "decoder_start_token_id", None),
    }
    if temperature > 0:
        settings["temperature"] = temperature
    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **{name: value.to(device) for name, value in (context or {}).items()},
                generation_config=GenerationConfig(**settings),
            )[0]
    finally:
        model.train(was_training)
    new = out if base.config.is_encoder_decoder else out[len(ids) :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def room_for(model: Any, ids: list[int]) -> int:
    """The number of tokens that the model's positions allow after a prompt."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = longest_input(base)
    if longest is None:
        return 2**31
    return longest - len(ids) if not base.config.is_encoder_decoder else longest
