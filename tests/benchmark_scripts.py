"""Loads files of ``benchmarks/``, which are scripts rather than modules of a package."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load_script(name):
    """A file of benchmarks/, which sees its siblings while it is loaded."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    # Dataclasses look for their module here.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
        for sibling in set(sys.modules) - before:
            if (FOLDER / f"{sibling}.py").is_file():
                del sys.modules[sibling]
    return module
