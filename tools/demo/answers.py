"""Answers of an evaluation, kept as they come, so that an evaluation continues after the process was killed."""

from __future__ import annotations

import json
from pathlib import Path

from demo.files import writing


class Answers:
    """The answers of finished requests: tokens by the number of the request.

    Each answer is one line of a file. A last line that is not complete is ignored.

    Args:
        path: The file. A missing file has no answers.
    """

    def __init__(self, path: Path):
        self._path = path
        self.known: dict[int, list[int]] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                row, tokens = json.loads(line)
                self.known[row] = tokens
        if text and not text.endswith("\n"):
            with writing(path), path.open("r+b") as file:
                file.truncate(len(text[: text.rfind("\n") + 1].encode()))

    def add(self, found: dict[int, list[int]]) -> None:
        """Write further answers.

        Raises:
            DemoError: The disk is full, or the file cannot be written.
        """
        self.known |= found
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps([row, tokens])}\n" for row, tokens in found.items())
