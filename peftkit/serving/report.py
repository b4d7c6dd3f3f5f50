"""Report for each tensor of an adapter what a server does with it, and whether the adapter serves as trained."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from peftkit.adapter_files import reading
from peftkit.errors import ContractError
from peftkit.loading import check_fits
from peftkit.portability import (
    AdapterFacts,
    inspect_adapter,
    model_without_weights,
    notes_for_peft,
    problems_for_peft,
)
from peftkit.serving import in_peft, llama_cpp, sglang, vllm
from peftkit.serving.rows import Adapter, Base, Row, Verdict

Target = Literal["peft", "vllm", "sglang", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
Serves = Literal["as trained", "differently", "as the base model", "not at all", "unknown"]

_SERVERS: dict[str, ModuleType] = {
    "peft": in_peft,
    "vllm": vllm,
    "sglang": sglang,
    "gguf": llama_cpp,
}
_PROBLEMS: tuple[Verdict, ...] = ("refused", "ignored", "wrong", "unknown")


@dataclass(frozen=True)
class ServingReport:
    """What a server does with an adapter.

    Attributes:
        target: ``peft``, ``vllm``, ``sglang`` or ``gguf`` (llama.cpp).
        server: The server's name, and the release whose source code the rules were read from.
        serves: ``as trained``; ``differently`` (it loads, but the outputs differ from training); ``as the base model`` (it
            loads, but changes nothing); ``not at all`` (the server raises an error); ``unknown`` (it depends on the base model).
        rows: One row for each tensor, after the rows of config fields that have an effect.
        notes: What the user has to do or know.
        facts: The content of the adapter's folder.
    """

    target: Target
    server: str
    serves: Serves
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    facts: AdapterFacts

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each cause of a problem, with a way out. Rows with the same cause share one sentence."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row.verdict in _PROBLEMS:
                groups.setdefault((row.verdict, row.why, row.way_out), []).append(row.subject)
        found = [_sentence(*cause, subjects) for cause, subjects in groups.items()]
        if self.serves == "as the base model" and not found:
            found.append("lora_B is zero in every pair, so the adapter changes nothing: train it")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
        return {
            **self.facts.to_dict(),
            "target": self.target,
            "server": self.server,
            "serves": self.serves,
            "fits": self.serves == "as trained",
            "rows": [vars(row) for row in self.rows],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def serving_report(
    adapter: str | Path,
    target: Target = "vllm",
    *,
    base: str | None = None,
    max_rank: int | None = None,
) -> ServingReport:
    """Report whether an adapter serves as trained, and what happens to each of its tensors.

    The rules were read from the source code of one release of each server, which the report names; nothing is started and no
    weights of the base model are read.

    Args:
        adapter: Folder of an adapter saved by PEFT or peftkit.
        target: ``peft``, ``vllm``, ``sglang``, or ``gguf`` for llama.cpp.
        base: Folder or hub id of the base model; only its config is read. With it the names of modules, shapes, embeddings and
            the layout of experts are checked too.
        max_rank: The server's ``--max-lora-rank``. Without it a note says which value is needed.

    Raises:
        ContractError: A file is missing or cannot be read, or a tensor is not finite.
        ValueError: The target is unknown, or transformers does not know the config of ``base``.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; use one of {', '.join(TARGETS)}")
    facts = inspect_adapter(adapter)
    server = _SERVERS[target]
    named = f"{server.SERVER.name} {server.SERVER.version}"
    if facts.written_by == "AdapterHub":
        way_out = "import it with peftkit.import_adapter, and save the result"
        row = Row(
            "adapter_config.json",
            "refused",
            f"it is in AdapterHub's format, which {target} cannot read",
            way_out,
        )
        return ServingReport(target, named, "not at all", (row,), (), facts)
    model = None if base is None else model_without_weights(base, facts)
    held = Adapter(
        facts.config,
        facts.shapes,
        frozenset(facts.zeros),
        None if model is None else _base(model),
        _added_tokens(facts.folder),
    )
    rows = _rows(server, target, held, max_rank)
    if model is not None and not any(row.verdict in _PROBLEMS for row in rows):
        rows += _fit_rows(model, target, held, facts)
    serves = _verdict(rows, held)
    notes = _notes(target, facts, held, base, max_rank)
    return ServingReport(target, named, serves, tuple(rows), tuple(notes), facts)


def _rows(server: ModuleType, target: Target, held: Adapter, max_rank: int | None) -> list[Row]:
    if target == "peft":
        own = [
            Row("peft_type", "refused", why, "upgrade peft")
            for why in problems_for_peft(held.config)
        ]
        return own + [_with_zeros(server.tensor_row(key, held), held) for key in held.keys]
    name, kind = server.SERVER.name, held.config["peft_type"]
    if kind != "LORA":
        why = f"{name} loads only LoRA adapters, but this adapter is {kind}"
        way_out = "serve it with PEFT, or train LoRA instead"
        return [Row("peft_type", "refused", why, way_out)]
    rows = [
        Row(rule.field, rule.verdict, f"{name} {rule.why}", rule.way_out)
        for rule in server.SERVER.fields
        if held.config.get(rule.field) not in rule.harmless
    ]
    rows += server.config_rows(held)
    rows += _rank_rows(name, target, held, max_rank)
    return rows + [_with_zeros(server.tensor_row(key, held), held) for key in held.keys]


def _with_zeros(row: Row, held: Adapter) -> Row:
    """``no effect`` for a tensor that loads in a pair whose ``lora_B`` is zero."""
    if row.verdict != "loads":
        return row
    for a, b in ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B")):
        if row.subject.replace(a, b) in held.zero and (a in row.subject or b in row.subject):
            return Row(row.subject, "no effect", "lora_B is zero, so this pair changes nothing")
    return row


def _rank_rows(name: str, target: Target, held: Adapter, max_rank: int | None) -> list[Row]:
    if target == "gguf":
        return []
    rank = max([held.config["r"], *held.ranks().values()])
    limit = max_rank if max_rank is not None else (vllm.RANKS[-1] if target == "vllm" else rank)
    if rank <= limit:
        return []
    if target == "vllm" and rank > vllm.RANKS[-1]:
        why = f"rank {rank}: the largest value of vLLM's --max-lora-rank is {vllm.RANKS[-1]}"
        return [Row("r", "refused", why, "merge the adapter, or train it with a smaller r")]
    why = f"rank {rank} is greater than --max-lora-rank {limit}"
    return [Row("r", "refused", why, f"start {name} with --max-lora-rank {_setting(target, rank)}")]


def _setting(target: Target, rank: int) -> int:
    """The smallest value of ``--max-lora-rank`` that allows this rank."""
    return next(r for r in vllm.RANKS if r >= rank) if target == "vllm" else rank


def _fit_rows(model: Any, target: Target, held: Adapter, facts: AdapterFacts) -> list[Row]:
    """A row if the adapter's tensors do not have the base model's names and shapes."""
    assert held.base is not None
    if target != "peft" and any(
        key.role and not (key.is_stack or key.is_one_expert) and key.module not in held.base.modules
        for key in held.keys
    ):
        return []  # the server's own rules find its modules in another way than PEFT
    try:
        check_fits(model, facts.folder)
    except ContractError as error:
        return [Row("base", "refused", str(error), "")]
    return []


def _verdict(rows: Iterable[Row], held: Adapter) -> Serves:
    verdicts = [row.verdict for row in rows]
    factors = {key.name for key in held.keys if key.role}
    if "refused" in verdicts:
        return "not at all"
    loaded = [row.verdict for row in rows if row.subject in factors]
    if loaded and not any(verdict in ("loads", "wrong", "unknown") for verdict in loaded):
        return "as the base model"
    if "wrong" in verdicts or "ignored" in verdicts:
        return "differently"
    return "unknown" if "unknown" in verdicts else "as trained"


def _notes(
    target: Target, facts: AdapterFacts, held: Adapter, base: str | None, max_rank: int | None
) -> list[str]:
    notes = notes_for_peft(facts.config) if target == "peft" else []
    if target in ("vllm", "sglang") and held.is_peft_lora and max_rank is None:
        rank = max([held.config["r"], *held.ranks().values()])
        default = vllm.DEFAULT_RANK if target == "vllm" else 0
        if default < rank <= vllm.RANKS[-1] or (target == "sglang" and held.base is None):
            notes.append(
                f"rank {rank}: start {_SERVERS[target].SERVER.name} with --max-lora-rank {_setting(target, rank)} or more"
                + (" if it loads the adapter after the start" if target == "sglang" else "")
            )
    if target in ("vllm", "sglang") and "float32" in facts.dtypes:
        notes.append("it is float32; the server casts it to the dtype of the base model")
    if target == "vllm" and (held.config.get("rank_pattern") or held.config.get("alpha_pattern")):
        notes.append(
            "rank_pattern and alpha_pattern need vLLM 0.33 or newer; for older releases write one rank and one scale: "
            "peftkit convert ADAPTER OUT --uniform"
        )
    silent = [key.module for key in held.keys if key.role.endswith("B") and key.name in held.zero]
    if silent and len(silent) < sum(key.role.endswith("B") for key in held.keys):
        notes.append(
            f"lora_B is zero in {len(silent)} modules, such as {silent[0]}: they were not trained, or got no tokens"
        )
    if base is None:
        notes.append(
            "not compared with a base model; pass base (--base) to check whether every key exists in this model"
        )
    return notes


def _sentence(verdict: str, why: str, way_out: str, subjects: list[str]) -> str:
    named = subjects[0] if len(subjects) == 1 else f"{subjects[0]} and {len(subjects) - 1} more"
    return f"{named}: {verdict}, because {why}" + (f". Way out: {way_out}" if way_out else "")


def _base(model: Any) -> Base:
    config = model.config
    text = config.get_text_config()
    embedding = model.get_input_embeddings()
    return Base(
        tuple(config.architectures or ()) or (type(model).__name__,),
        config.model_type,
        getattr(embedding, "num_embeddings", getattr(text, "vocab_size", None)),
        bool(getattr(text, "tie_word_embeddings", False)),
        frozenset(name for name, _ in model.named_modules()),
    )


def _added_tokens(folder: Path) -> int | None:
    """The highest id in ``added_tokens.json``."""
    file = folder / "added_tokens.json"
    if not file.is_file():
        return None
    with reading(file):
        ids = json.loads(file.read_text("utf-8"))
        return max(map(int, ids.values()), default=None)
