"""Run a Python process and read the lines that it prints while it works."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence


def run_child(
    arguments: Sequence[str],
    what: str,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a new interpreter, and call ``on_line`` with each line of its standard output.

    Args:
        arguments: The arguments of the interpreter.
        what: What the process does, for the error.
        on_line: Called with each line, without the line break.
        environment: The environment of the process; by default that of this process.

    Raises:
        RuntimeError: The process failed. The message has its error output.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line.rstrip("\n"))
            status = process.wait()
        finally:
            if process.poll() is None:  # an exception such as KeyboardInterrupt
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if status != 0:
            errors.seek(0)
            raise RuntimeError(f"{what} failed with status {status}:\n{errors.read().strip()}")
