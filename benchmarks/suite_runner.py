"""Measuring the points of the suite: each run in its own process, the libraries of a method in turn, bad rows refused."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import guard
import instructions
import libraries
import records
import verdict
from points import AXES, Point, reference_of
from report import HERE
from suite_bases import base_folder

SMOKE = {"rounds": 1, "warm": 3, "steps": 2, "retries": 0, "wait": 0}
"""Options that ``--smoke`` replaces, so that the whole command takes at most two minutes on two quiet cores."""


class Suite:
    """One run of a command.

    Args:
        name: The suite's name in the rows.
        arguments: The options of ``suite.add_run_options``.

    Raises:
        SystemExit: An option has a wrong value.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.arguments = name, arguments
        if arguments.smoke:
            for option, value in SMOKE.items():
                setattr(arguments, option, value)
        for option, least in (("rounds", 1), ("warm", 1), ("steps", 2)):
            if getattr(arguments, option) < least:
                raise SystemExit(
                    f"--{option} {getattr(arguments, option)}: it must be {least} or more"
                )
        self.interpreters = dict(_interpreter(text) for text in arguments.python)
        self.variables = os.environ | instructions.variables(arguments.isa)
        if not arguments.gpu:
            self.variables["CUDA_VISIBLE_DEVICES"] = ""
        self.environment = self._child([sys.executable, str(HERE / "records.py")])
        if arguments.gpu and not self.environment["gpu"]:
            raise SystemExit("--gpu: torch sees no GPU on this machine; leave --gpu out")
        too_new = instructions.too_new(self.environment["instructions"], arguments.isa)
        if too_new is not None:
            raise SystemExit(f"--isa {arguments.isa} has no effect: {too_new}")
        self.versions = {
            library: self._child([python, "-c", records.VERSIONS_SCRIPT])
            for library, python in self.interpreters.items()
        }
        self.path = arguments.out or records.path_of(self.environment["device"])
        self.guard = guard.Guard()

    def measure(self, points: Iterable[Point]) -> list[dict[str, Any]]:
        """Measure the points, the libraries of a method in turn; the rows of a method are stored as soon as its runs are done."""
        kept = {}
        if self.arguments.resume:
            rows = [
                row
                for row in records.read(self.path)
                if records.is_finished(row, self._environment(row["library"]))
            ]
            kept = {records.key(row): row for row in rows}
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for _, group in groupby(points, lambda point: (point.method, point.sizes)):
                rows += self._group(list(group), kept, Path(folder))
        return rows

    def _group(
        self, points: list[Point], kept: dict[Any, dict[str, Any]], folder: Path
    ) -> list[dict[str, Any]]:
        rows = {point: kept.get(records.key(self._row(point))) for point in points}
        missing = [point for point, row in rows.items() if row is None]
        reasons = {p: absence(p.library, self._python(p), self.arguments.gpu) for p in missing}
        present = [point for point in missing if reasons[point] is None]
        runs: dict[Point, list[dict[str, Any]]] = {point: [] for point in present}
        for number in range(self.arguments.rounds):
            for point in present:
                print(
                    f"round {number + 1} of {self.arguments.rounds}: {point.provider}",
                    *(f"{name} {getattr(point, name)}" for name in ("case", *list(AXES)[:4])),
                    sep=", ",
                    file=sys.stderr,
                    flush=True,
                )
                runs[point].append(self._run(point, base_folder(point.case, folder)))
        for point in points:  # a method's reference is before the others
            if rows[point] is None:
                reason = reasons[point]
                row = self._row(point) | {"status": "absent", "reason": reason}
                if reason is None:
                    row |= self._judged(point, runs[point], rows)
                if row["status"] == "ok" and self.arguments.target is not None:
                    row["target"] = self._target(point, base_folder(point.case, folder))
                records.append(self.path, row)
                rows[point] = row
        return [row for row in rows.values() if row is not None]

    def _environment(self, library: str) -> dict[str, Any]:
        """The environment of the processes that run a library."""
        versions = self.versions.get(library)
        return self.environment | ({"versions": versions} if versions else {})

    def _row(self, point: Point) -> dict[str, Any]:
        options = {name: getattr(self.arguments, name) for name in ("isa", "smoke", "target")}
        return {
            "suite": self.name,
            **point.to_dict(),
            "isa": options["isa"],
            "smoke": options["smoke"],
            "target_loss": options["target"],
            **dict.fromkeys(_MEASURED),
            "spin_spread": self.guard.calm.spread,
            "environment": self._environment(point.library),
        }

    def _judged(
        self, point: Point, runs: list[dict[str, Any]], rows: dict[Point, dict[str, Any] | None]
    ) -> dict[str, Any]:
        """The figures of a row, or the reason for which they are refused."""
        failed = next((run["failed"] for run in runs if "failed" in run), None)
        if failed is not None:
            return {"status": "refused", "reason": f"it failed: {failed}"}
        reference = replace(point, library=reference_of(point.method, point.library))
        expected = runs[0] if reference == point else rows.get(reference)
        found = {name: runs[0][name] for name in ("trainable", "losses", "instructions")}
        if expected is None or not expected.get("losses"):
            reason = f"its reference, {reference.provider}, was not measured"
            return {**found, "status": "refused", "reason": reason}
        reason = verdict.refusal(
            runs,
            expected["losses"],
            expected["trainable"],
            self.guard.best_spin,
            verdict.ROUNDED_TOLERANCE if runs[0]["is_rounded"] else verdict.LOSS_TOLERANCE,
        ) or instructions.too_new(runs[0]["instructions"], self.arguments.isa)
        if reason is not None:
            return {**found, "status": "refused", "reason": reason}
        return {**found, "status": "ok", "reason": None, **figures(point, runs)}

    def _run(self, point: Point, base: Path) -> dict[str, Any]:
        """One run of a point; it is repeated if the machine was busy."""
        command = [self._python(point), *self._command(point, base)]
        try:
            return self.guard.run(
                lambda: self._child(command), self.arguments.retries, self.arguments.wait
            )
        except RuntimeError as error:
            return {"failed": str(error)}

    def _target(self, point: Point, base: Path) -> dict[str, Any]:
        """How long the point trains until it has the loss that is asked for, as ``suite_target.py`` prints it."""
        options = self._options(point, base)
        options |= {"target": self.arguments.target, "most": self.arguments.target_steps}
        print(f"to a loss of {self.arguments.target}: {point.provider}", file=sys.stderr)
        try:
            return self._child(
                [self._python(point), str(HERE / "suite_target.py"), json.dumps(options)]
            )
        except RuntimeError as error:
            return {"failed": str(error)}

    def _command(self, point: Point, base: Path) -> list[str]:
        options = self._options(point, base)
        options |= {"warm": self.arguments.warm, "steps": self.arguments.steps}
        return [str(HERE / "suite_row.py"), json.dumps(options)]

    @staticmethod
    def _options(point: Point, base: Path) -> dict[str, Any]:
        return {"folder": str(base), **{k: v for k, v in asdict(point).items() if k != "case"}}

    def _python(self, point: Point) -> str:
        return self.interpreters.get(point.library, sys.executable)

    def _child(self, command: list[str]) -> dict[str, Any]:
        """The JSON document that a process prints as its last line; raises ``RuntimeError`` with its last words if it fails."""
        limit = self.arguments.limit
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=self.variables,
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it did not end within {limit} s (--limit)") from None
        except OSError as error:
            raise RuntimeError(str(error)) from None
        if done.returncode != 0:
            raise RuntimeError(verdict.last_words(done.stderr, done.returncode))
        return json.loads(done.stdout.splitlines()[-1])


_MEASURED = (
    *("step_seconds", "step_spread", "tokens_per_second", "peak_bytes", "allocator_bytes"),
    *("trainable", "losses", "instructions", "target"),
)


def figures(point: Point, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of all timed steps, tokens per second, and the highest peaks."""
    seconds = [second for run in runs for second in run["seconds"]]
    median = statistics.median(seconds)
    return {
        "step_seconds": median,
        "step_spread": [min(seconds), max(seconds)],
        "tokens_per_second": point.batch * point.length / median,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "allocator_bytes": max(run["allocator_bytes"] for run in runs),
    }


def absence(library: str, python: str, gpu: bool) -> str | None:
    """Why a library cannot be measured, as a sentence, or ``None`` if it can."""
    module = libraries.MODULES.get(library)
    if module is None:
        return None
    if library == "Liger" and not gpu:
        return "Liger's kernels run on GPUs only"
    if not _installed(module, python):
        return f"{module} is not installed"
    return None


def _installed(module: str, python: str) -> bool:
    if python == sys.executable:
        return find_spec(module) is not None
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", test], check=False).returncode == 0


def _interpreter(text: str) -> tuple[str, str]:
    library, _, path = text.partition("=")
    if library not in libraries.MODULES or not path:
        raise SystemExit(
            f"--python {text}: write LIBRARY=PATH with one of {', '.join(libraries.MODULES)}"
        )
    if not Path(path).is_file():
        raise SystemExit(f"--python {text}: there is no interpreter {path}")
    return library, path
