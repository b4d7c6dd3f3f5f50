"""Ask Triton's compiler in a child process: this one runs kernels in the interpreter, and triton cannot do both."""

import json
import os
import subprocess
import sys
from pathlib import Path


def machine_code(script):
    """What ``script`` prints as JSON, run by a Python that compiles.

    Args:
        script: Source code; the modules of this folder can be imported.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-P", "-c", script]
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)
