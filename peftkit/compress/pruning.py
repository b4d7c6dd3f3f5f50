"""``prune``: an adapter with smaller ranks or a sparse model in a new folder, with a report of what was lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peftkit.compress.report import REPORT, PruneReport
from peftkit.errors import ContractError, short
from peftkit.finetune.run_folder import RECIPE
from peftkit.finetune.using import evaluate_weights, open_run, weights_of
from peftkit.merging.files import new_folder, parse_size, require_absent, write_json


def prune(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    data: Any = None,
    max_shard_size: int | str = "5GB",
) -> PruneReport:
    """Prune a trained LoRA, or the weights of a model, and write the result to a new folder. The source is not changed.

    With ``rank`` or ``energy`` the update ``scale · B A`` of each layer of a LoRA is replaced by the nearest one of a smaller rank (Eckart and
    Young, 1936), from the QR factors of both matrices. The result is an ordinary adapter of PEFT, whose config has the rank of each layer.

    With ``sparsity`` or ``pattern`` the smallest weights of each linear layer become zero; embeddings, norms, heads and routers stay as they are.
    One layer at a time is in memory. The result is an ordinary model of the same size.

    Args:
        source: Folder of an adapter, folder or id of a model, or folder of a finished run of ``peftkit train``.
        out: A folder that does not exist yet, or is empty. It has its name only when it is complete.
        rank: Largest rank of a layer.
        energy: Share of the squared norm of each layer's update that is kept, between 0 and 1; each layer gets the smallest rank that keeps it.
        sparsity: Share of zeros in each layer, between 0 and 1.
        pattern: ``"2:4"`` or ``"4:8"``: so many of each 4 or 8 neighbouring inputs of an output are not zero.
        data: Rows on which the model is evaluated before and after, as ``data.eval`` of a recipe. Only for a run.
        max_shard_size: Bytes in one file of a model, or a text such as ``"5GB"``.

    Returns:
        The report, which is also in ``prune.json`` in the new folder.

    Raises:
        ContractError: The source is of another kind, an argument is out of range, or nothing would become smaller. Nothing is left in ``out``.
    """
    given = {"rank": rank, "energy": energy, "sparsity": sparsity, "pattern": pattern}
    _require_one(given)
    _require_ranges(rank, energy, sparsity, pattern)
    limit, out = parse_size(max_shard_size), Path(out)
    require_absent(out)
    lowers_ranks = rank is not None or energy is not None
    weights, run = _places(source, lowers_ranks)
    if data is not None and run is None:
        raise ContractError(
            f"data={short(data)} needs the folder of a run, which has the task; {source} is none. Leave it out"
        )
    from peftkit.compress.adapter import prune_adapter
    from peftkit.compress.weights import prune_weights

    before = None if data is None or run is None else evaluate_weights(run, data, None)
    with new_folder(out.absolute()) as folder:
        if lowers_ranks:
            report = prune_adapter(Path(weights), folder, rank, energy)
        else:
            report = prune_weights(weights, folder, sparsity, pattern, limit)
        if Path(weights).is_dir():
            _copy_card(Path(weights), folder, report.setting)
        report.out, report.before = str(out), before
        if run is not None and before is not None:
            report.after = evaluate_weights(run, data, folder)
        write_json(folder / REPORT, report.to_dict())
    return report


def _require_one(given: dict[str, Any]) -> None:
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ContractError(
            f"{' and '.join(f'{name}={given[name]}' for name in chosen) or 'nothing'} is given; give exactly one of {', '.join(given)}"
        )


def _require_ranges(
    rank: int | None, energy: float | None, sparsity: float | None, pattern: str | None
) -> None:
    from peftkit.compress.weights import PATTERNS

    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ContractError(f"rank={short(rank)} must be a whole number of at least 1")
    for name, share, example in (("energy", energy, 0.99), ("sparsity", sparsity, 0.5)):
        if share is not None and not 0 < share < 1:
            raise ContractError(f"{name}={short(share)} must be between 0 and 1, such as {example}")
    if pattern is not None and pattern not in PATTERNS:
        raise ContractError(f"pattern={short(pattern)} is unknown; use {' or '.join(PATTERNS)}")


def _places(source: str | os.PathLike[str], lowers_ranks: bool) -> tuple[str, Path | None]:
    """The folder or id of the weights, and the folder of the run if the source is one.

    Raises:
        ContractError: The source has weights of the other kind.
    """
    weights = weights_of(source)
    place = Path(weights)
    run = open_run(source)[1].path if (Path(source) / RECIPE).is_file() else None
    is_adapter = (place / "adapter_config.json").is_file()
    if is_adapter and not lowers_ranks:
        raise ContractError(
            f"{place} is an adapter, and sparsity and pattern are for the weights of a model; use rank or energy, or merge it first (peftkit "
            "merge)"
        )
    if lowers_ranks and not is_adapter and (place / "config.json").is_file():
        raise ContractError(
            f"{place} is a model, which has no ranks; prune its weights with sparsity or pattern"
        )
    return weights, run


def _copy_card(source: Path, folder: Path, setting: str) -> None:
    """Copy the model card with a sentence about the pruning."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.is_file() else ""
    note = f"Made smaller by `peftkit prune` ({setting}); prune.json says what was lost.\n"
    (folder / "README.md").write_text(text + note, encoding="utf-8")
