"""What PEFT's ``from_pretrained`` does with an adapter's keys."""

from __future__ import annotations

from importlib.metadata import version

from peftkit.serving.rows import NAMES, Adapter, Key, Row, Server

SERVER = Server("PEFT", version("peft"), "peft/utils/save_and_load.py", ())


def config_rows(adapter: Adapter) -> list[Row]:
    """No rows: PEFT reads all fields that it knows, and the notes name those that it does not know."""
    return []


def tensor_row(key: Key, adapter: Adapter) -> Row:
    """What PEFT does with one tensor: keys that match no module are skipped with a warning."""
    if not adapter.is_peft_lora or not key.role:
        return Row(key.name, "loads")
    if not key.has_prefix:
        why = "PEFT skips keys that do not start with base_model.model., with a warning"
        return Row(key.name, "ignored", why, NAMES)
    if key.has_adapter_name and not key.rest.startswith("default"):
        # PEFT accepts the name under which it loads an adapter, by default "default"
        why = f"PEFT skips this name, with a warning, because it has {key.rest!r} after {key.role}"
        return Row(key.name, "ignored", why, NAMES)
    if key.is_wrapped:
        why = "PEFT finds no module of this name, because a wrapper around the model added to it, and skips it with a warning"
        return Row(key.name, "ignored", why, NAMES)
    return Row(key.name, "loads")
