"""Commands that the reader can copy: they start the demo, or what the project installs, from the present folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def demo_command(options: list[str]) -> str:
    """The command that runs the demo with ``options``: by ``make`` if that would use this interpreter, else by this interpreter."""
    if _made_here():
        if not options:
            return "make demo"
        words = shlex.join(options)
        return f"make demo ARGS={words}" if len(options) == 1 else f'make demo ARGS="{words}"'
    script = _ROOT / "tools" / "run.py"
    return shlex.join([_short(sys.executable), _short(script), "demo", *options])


def peftkit_command(*words: str) -> str:
    """A command of ``peftkit``, by the path of the environment's own script, which is not on the PATH after ``make demo``."""
    script = Path(sys.executable).with_name("peftkit")
    return " ".join([shlex.quote(_short(script)) if script.exists() else "peftkit", *words])


def _made_here() -> bool:
    """Whether ``make demo`` in the present folder runs this interpreter."""
    own = Path(".venv", "bin", "python")
    here = Path.cwd() == _ROOT and own.exists()
    return here and own.absolute() == Path(sys.executable).absolute()


def _short(path: str | Path) -> str:
    """The path relative to the present folder if it is inside it, else the whole path. Links are not followed."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
