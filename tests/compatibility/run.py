"""Try every method on every architecture of ``cases.py``, and write the results.

    python tests/compatibility/run.py

writes docs/compatibility.md and docs/compatibility.json. If architectures are named as arguments, only these are tried again, and the
other rows stay the same. The exit status is 1 if a cell fails.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from compatibility import page  # noqa: E402 - found through the line above
from compatibility.cases import CASES  # noqa: E402

from peftkit.compatibility import CELLS, METHODS, run_cells  # noqa: E402

RESULTS = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"


def main() -> int:
    arguments = _parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    held = json.loads(RESULTS.read_text()) if arguments.families and RESULTS.exists() else {}
    rows = held.get("families", {})
    started = time.perf_counter()
    for key in arguments.families or CASES:
        rows[CASES[key].name] = {
            method: {
                cell: [outcome.verdict, outcome.why]
                for cell, outcome in run_cells(CASES[key], method).items()
            }
            for method in METHODS
        }
        done = time.perf_counter() - started
        print(f"{done:6.0f} s  {CASES[key].name}: {page.counts(rows[CASES[key].name])}", flush=True)
        _write({case.name: rows[case.name] for case in CASES.values() if case.name in rows})
    print(f"written: {PAGE.relative_to(ROOT)}, {RESULTS.relative_to(ROOT)}")
    failed = [
        f"{name}, {method}, {cell}: {why}"
        for name, methods in rows.items()
        for method, cells in methods.items()
        for cell, (verdict, why) in cells.items()
        if verdict == "fails"
    ]
    for line in failed:
        print(line, file=sys.stderr)
    return bool(failed)


def _write(families: dict) -> None:
    versions = {name: version(name) for name in ("transformers", "peft", "torch", "bitsandbytes")}
    results = {"versions": versions, "cells": list(CELLS), "families": families}
    RESULTS.write_text(_lines(results))
    PAGE.write_text(page.markdown(results))


def _lines(results: dict) -> str:
    """JSON with one line per architecture and method, so that a change of one cell changes one line."""
    families = []
    for name, row in results["families"].items():
        methods = [f"  {_json(method)}: {_json(cells)}" for method, cells in row.items()]
        families.append(f" {_json(name)}: {{\n" + ",\n".join(methods) + "\n }")
    head = [f"{_json(key)}: {_json(results[key])}" for key in ("versions", "cells")]
    return "{" + ",\n".join([*head, '"families": {\n' + ",\n".join(families)]) + "\n}}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *CASES], help="only these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
