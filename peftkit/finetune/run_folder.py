"""The folder of a run: its files, how they are written, and whether a run can start or continue there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError, listing, short
from peftkit.finetune.checkpoints import checkpoints_in, is_whole
from peftkit.finetune.files import write_text
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_lock import LOCK

if TYPE_CHECKING:
    from peftkit.finetune.stages.recipe import StagedRecipe
    from peftkit.finetune.together.recipe import AdaptersRecipe

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
DATA = "data.json"
ENVIRONMENT = "environment.json"
REPORT = "report.md"
PAGE = "report.html"
SAMPLES = "samples.json"
_FREE = {
    "data.preview",
    "training.stop_after",
    "training.log_every",
    "training.report_to",
    "training.samples",
    "training.sample_tokens",
    "training.keep_checkpoints",
    "training.workers",
    "out",
}
"""Keys that may change when a run is resumed, because they do not change the weights."""

_OF_THE_BEST = ("training.best_metric", "training.early_stopping")
"""Keys that may change when ``training.best_metric`` becomes ``last``: the user gives the best checkpoint up."""


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
            self._require_writable_parent()
            return
        if not self.path.is_dir():
            raise ContractError(f"out={str(self.path)!r} is a file; name a new folder")
        if (self.path / RECIPE).exists():
            raise ContractError(
                f"out={str(self.path)!r} already has a run; continue it with resume=true, or name another folder: out={self.path}-2"
            )
        content = sorted(entry.name for entry in self.path.iterdir() if not _left_by_start(entry))
        if content:
            raise ContractError(
                f"out={str(self.path)!r} is not empty and is no run:\n{listing(content)}\nName a new folder."
            )

    def _require_writable_parent(self) -> None:
        # A parent may be a link to nothing.
        above = next(path for path in self.path.absolute().parents if os.path.lexists(path))
        if not above.is_dir():
            raise ContractError(
                f"out={str(self.path)!r} cannot be made, because {above} is no folder; name another folder"
            )
        if not os.access(above, os.W_OK | os.X_OK):
            raise ContractError(
                f"out={str(self.path)!r} cannot be made, because {above} cannot be written; name another folder"
            )

    def require_run(self) -> None:
        """Raise ``ContractError`` unless a run was started here."""
        if not (self.path / RECIPE).is_file():
            raise ContractError(
                f"resume=true, but out={str(self.path)!r} has no run (no {RECIPE}); remove resume=true to start one"
            )

    def remove_if_unused(self) -> None:
        """Remove the folder if it has nothing but what a run makes before it writes its recipe."""
        if self.path.is_dir() and all(_left_by_start(entry) for entry in self.path.iterdir()):
            for entry in self.path.iterdir():
                entry.rmdir() if entry.is_dir() else entry.unlink()
            self.path.rmdir()

    def require_same(self, recipe: dict[str, Any]) -> None:
        """Raise ``ContractError`` unless the run here was started with this recipe, except for keys that change no weight."""
        import yaml

        self.require_run()
        file = self.path / RECIPE
        before, now = _flat(yaml.safe_load(file.read_text(encoding="utf-8"))), _flat(recipe)
        differ = [
            f"{name}: {short(before.get(name))} before, {short(now.get(name))} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and _without_stage(name) not in _FREE
            and not _gives_up_best(name, now)
        ]
        if differ:
            raise ContractError(
                f"resume=true, but the recipe is not that of the run in {self.path}:\n{listing(differ, 8)}\nUse the same values, or start "
                "a new run in another folder."
            )

    def last_whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are all there as they were written, and the names of newer ones that are not."""
        broken = []
        for folder in reversed(checkpoints_in(self.checkpoints)):
            if is_whole(folder, read=True):
                return folder, broken
            broken.append(folder.name)
        return None, broken


def _left_by_start(entry: Path) -> bool:
    """Whether a run that ended before it had written its recipe can have left this."""
    if entry.name == CHECKPOINTS:
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name in (LOCK, f".{RECIPE}.partial")


def _gives_up_best(name: str, now: dict[str, Any]) -> bool:
    key = _without_stage(name)
    stage = name.removesuffix(key)
    return key in _OF_THE_BEST and now.get(f"{stage}training.best_metric") == "last"


def written_recipe(recipe: Recipe | StagedRecipe | AdaptersRecipe) -> str:
    """The resolved recipe as YAML."""
    import yaml

    return "# The recipe of this run, with every default filled in.\n" + yaml.safe_dump(
        recipe.to_dict(), sort_keys=False, allow_unicode=True
    )


def _without_stage(name: str) -> str:
    return re.sub(r"^(stages|adapters)\.[^.]+\.", "", name)


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    if isinstance(values, list) and values and all(isinstance(one, dict) for one in values):
        values = {str(number): one for number, one in enumerate(values, start=1)}
    if not isinstance(values, dict) or not values:
        return {before.rstrip("."): values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.")
    return found
