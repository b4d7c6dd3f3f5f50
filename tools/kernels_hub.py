"""Lay out ``peftkit_kernels`` for the Hugging Face kernels hub.

    python tools/kernels_hub.py dist/kernels-hub         # make kernels-hub

The folder has what kernel-builder reads (``build.toml``, ``torch-ext/peftkit_kernels/``) and, in ``build/``, the variants that the package
``kernels`` loads: kernels in pure Python need no compiler, so a variant is a copy of the sources with ``metadata.json``. The layout is
that of https://huggingface.co/docs/kernels (kernel requirements, writing kernels).

A kernel is loaded under a name of its own, and several versions of it may be loaded at once. So the copy differs in two ways: imports of
the package are relative, and the torch.library ops have a namespace that kernel-builder makes for each version.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "kernels" / "peftkit_kernels"
PACKAGE = SOURCE.name
NAME = PACKAGE.replace("_", "-")
VERSION = 0
"""The hub's version of the interface; 0 means that it may still change."""
BACKENDS = "cpu", "cuda"
SUFFIXES = ".py", ".c", ".h"

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
pyext = ["py", "c", "h"]
"""

FLAKE_NIX = """\
{
  description = "The kernels of peftkit";
  inputs.builder.url = "github:huggingface/kernels";
  outputs = { self, builder }: builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

NAMESPACE = '''\
"""The namespace of the package's torch.library ops, which kernel-builder makes for each version."""

from .._ops import add_op_namespace_prefix


def library_name(name: str) -> str:
    """The full name of an op."""
    return add_op_namespace_prefix(name)
'''

OPS = '''\
"""The namespace of this build's torch.library ops. kernel-builder writes this file for builds of its own."""


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"{id}::{{op_name}}"
'''

_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ", flags=re.MULTILINE)


def assemble(out: Path) -> None:
    """Write the folder ``out``; an older one of that name is replaced when the new one is complete.

    Raises:
        ValueError: ``out`` exists and is not a folder that this function has written, or a source imports the package in a way that
            cannot be made relative.
    """
    if out.exists() and not (out / "build.toml").is_file():
        raise ValueError(f"out={str(out)!r} exists and has no build.toml; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "new"
        sources = folder / "torch-ext" / PACKAGE
        _write_sources(sources)
        (folder / "build.toml").write_text(BUILD_TOML, encoding="utf-8")
        (folder / "flake.nix").write_text(FLAKE_NIX, encoding="utf-8")
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
        for backend in BACKENDS:
            _write_variant(folder / "build" / f"torch-{backend}", sources, backend)
        if out.exists():
            out.rename(Path(scratch) / "old")
        folder.rename(out)


def _write_sources(folder: Path) -> None:
    """Copy the package with relative imports."""
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        place = path.relative_to(SOURCE)
        text = path.read_text(encoding="utf-8")
        if place.as_posix() == "core/namespace.py":
            text = NAMESPACE
        if path.suffix == ".py":
            text = relative_imports(text, len(place.parts))
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def relative_imports(text: str, depth: int) -> str:
    """A source whose imports of the package are relative.

    Args:
        text: The source.
        depth: The number of parts of the file's path in the package: 1 for ``gemm.py``, 2 for ``core/plan.py``.

    Raises:
        ValueError: It has an import of another form than ``from peftkit_kernels... import ...``.
    """
    dots = "." * depth
    text = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", text)
    left = re.search(rf"^\s*(import|from) {PACKAGE}\b.*$", text, flags=re.MULTILINE)
    if left is not None:
        raise ValueError(
            f"{left[0].strip()!r} cannot be made relative; write `from {PACKAGE}.MODULE import NAME`"
        )
    return text


def _write_variant(folder: Path, sources: Path, backend: str) -> None:
    """Write a build of the sources that ``kernels`` loads on this backend."""
    shutil.copytree(sources, folder)
    content = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(sources).as_posix().encode() + path.read_bytes())
    identifier = f"_{PACKAGE}_{backend}_{content.hexdigest()[:7]}"
    (folder / "_ops.py").write_text(OPS.format(id=identifier), encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": NAME,
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    assemble(arguments.out)
    print(f"wrote {arguments.out}")
