"""``python -m peftkit``: the command line application, for launchers such as torchrun."""

import sys
from pathlib import Path

# Python looks for modules in the working folder first. There, a folder such as bottleneck/ would be taken for a package that pandas uses.
if Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from peftkit.cli.main import app

if __name__ == "__main__":
    app(prog_name="peftkit")
