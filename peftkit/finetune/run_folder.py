"""The folder of a run: its files, how they are written, and whether a run can start or continue there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError, listing, short
from peftkit.finetune.recipe import Recipe

if TYPE_CHECKING:
    from peftkit.finetune.stages.recipe import StagedRecipe

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
DATA = "data.json"
ENVIRONMENT = "environment.json"
REPORT = "report.md"
PAGE = "report.html"
SAMPLES = "samples.json"
WHOLE = "whole.json"
"""In a checkpoint: the sizes of its files, written last."""

_FREE = {
    "data.preview",
    "training.stop_after",
    "training.log_every",
    "training.samples",
    "training.sample_tokens",
    "training.keep_checkpoints",
    "training.workers",
    "out",
}
"""Keys that may change when a run is resumed, because they do not change the weights."""


class RunFolder:
    """The folder of one run.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def write_json(self, name: str, value: Any) -> None:
        """Write a file as JSON; it is complete or not there."""
        write_text(self.path / name, json.dumps(value, indent=1, default=str) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a file of JSON, or ``None`` if it is not there."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ContractError(
                f"{file} is no valid JSON ({error}); the run cannot be used"
            ) from None

    def require_free(self) -> None:
        """Raise ``ContractError`` unless a new run can start here."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ContractError(f"out={str(self.path)!r} is a file; name a new folder")
        if (self.path / RECIPE).exists():
            raise ContractError(
                f"out={str(self.path)!r} already has a run; continue it with resume=true, or name another folder: out={self.path}-2"
            )
        content = sorted(entry.name for entry in self.path.iterdir())
        if content:
            raise ContractError(
                f"out={str(self.path)!r} is not empty and is no run:\n{listing(content)}\nName a new folder."
            )

    def require_same(self, recipe: dict[str, Any]) -> None:
        """Raise ``ContractError`` unless the run here was started with this recipe, except for keys that change no weight."""
        import yaml

        file = self.path / RECIPE
        if not file.is_file():
            raise ContractError(
                f"resume=true, but out={str(self.path)!r} has no run (no {RECIPE}); remove resume=true to start one"
            )
        before, now = _flat(yaml.safe_load(file.read_text(encoding="utf-8"))), _flat(recipe)
        differ = [
            f"{name}: {short(before.get(name))} before, {short(now.get(name))} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and _without_stage(name) not in _FREE
        ]
        if differ:
            raise ContractError(
                f"resume=true, but the recipe is not that of the run in {self.path}:\n{listing(differ, 8)}\nUse the same values, or start "
                "a new run in another folder."
            )

    def last_whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are all there in full, and the names of newer ones that are not."""
        found = []
        for folder in self.checkpoints.glob("checkpoint-*") if self.checkpoints.is_dir() else []:
            number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            if number and folder.is_dir():
                found.append((int(number[1]), folder))
        broken = []
        for _, folder in sorted(found, reverse=True):
            if _is_whole(folder):
                return folder, broken
            broken.append(folder.name)
        return None, broken


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def mark_whole(folder: Path) -> None:
    """Write down the sizes of a checkpoint's files, when all have been written."""
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != WHOLE
    }
    write_text(folder / WHOLE, json.dumps(sizes))


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


def written_recipe(recipe: Recipe | StagedRecipe) -> str:
    """The resolved recipe as YAML."""
    import yaml

    return "# The recipe of this run, with every default filled in.\n" + yaml.safe_dump(
        recipe.to_dict(), sort_keys=False, allow_unicode=True
    )


def _without_stage(name: str) -> str:
    return re.sub(r"^stages\.\d+\.", "", name)


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    if isinstance(values, list) and values and all(isinstance(one, dict) for one in values):
        values = {str(number): one for number, one in enumerate(values, start=1)}
    if not isinstance(values, dict) or not values:
        return {before.rstrip("."): values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.")
    return found
