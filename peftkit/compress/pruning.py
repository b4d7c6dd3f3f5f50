"""``prune``: a smaller adapter or a sparse model in a new folder, with a report of what was lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peftkit.compress.report import REPORT, PruneReport
from peftkit.errors import ContractError, short
from peftkit.merging.files import new_folder, require_absent, write_json

_WAYS = ("rank", "energy", "sparsity", "pattern")


def prune(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    data: Any = None,
) -> PruneReport:
    """Prune a trained LoRA and write the result to a new folder. The source is not changed.

    The update ``scale · B A`` of each layer is replaced by the nearest one of a smaller rank (Eckart and Young, 1936), from the QR factors of
    both matrices. The result is an ordinary adapter of PEFT, whose config has the rank of each layer.

    Args:
        source: Folder of an adapter, or of a finished run of ``peftkit train``.
        out: A folder that does not exist yet, or is empty. It has its name only when it is complete.
        rank: Largest rank of a layer.
        energy: Share of the squared norm of each layer's update that is kept, between 0 and 1; each layer gets the smallest rank that keeps it.
        data: Rows on which the model is evaluated before and after, as ``data.eval`` of a recipe. Only for a run.

    Returns:
        The report, which is also in ``prune.json`` in the new folder.

    Raises:
        ContractError: The source is of another kind, an argument is out of range, or nothing would become smaller. Nothing is left in ``out``.
    """
    given = {"rank": rank, "energy": energy}
    _require_one(given)
    _require_ranges(rank, energy)
    source, out = Path(source), Path(out)
    require_absent(out)
    adapter, run = _places(source)
    if data is not None and run is None:
        raise ContractError(
            f"data={short(data)} needs the folder of a run, which has the task; {source} is none. Leave it out"
        )
    from peftkit.compress.adapter import prune_adapter

    before = None if data is None or run is None else _measured(run, data, adapter)
    with new_folder(out.absolute()) as folder:
        report = prune_adapter(adapter, folder, rank, energy)
        report.out, report.before = str(out), before
        if run is not None and before is not None:
            report.after = _measured(run, data, folder)
        write_json(folder / REPORT, report.to_dict())
    return report


def _require_one(given: dict[str, Any]) -> None:
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ContractError(
            f"{' and '.join(f'{name}={given[name]}' for name in chosen) or 'nothing'} is given; give exactly one of {', '.join(given)}"
        )


def _require_ranges(rank: int | None, energy: float | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ContractError(f"rank={short(rank)} must be a whole number of at least 1")
    if energy is not None and not 0 < energy < 1:
        raise ContractError(f"energy={short(energy)} must be between 0 and 1, such as 0.99")


def _places(source: Path) -> tuple[Path, Path | None]:
    """The folder of the weights, and that of the run if the source is one."""
    from peftkit.finetune.run_folder import RECIPE
    from peftkit.finetune.using import open_run
    from peftkit.finetune.weights import ADAPTER

    if not (source / RECIPE).is_file():
        return source, None
    _, folder = open_run(source)
    adapter = folder.path / ADAPTER
    if not adapter.is_dir():
        raise ContractError(
            f"the run in {source} has trained the model itself, which has no ranks; prune its weights with sparsity or pattern"
        )
    return adapter, folder.path


def _measured(run: Path, data: Any, weights: Path) -> dict[str, float]:
    from peftkit.finetune.using import evaluate_weights

    return evaluate_weights(run, data, weights)
