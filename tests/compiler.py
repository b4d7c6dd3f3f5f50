"""Runs Triton's compiler in a child process, because this process runs kernels in the interpreter and Triton cannot do both."""

import json
import os
import subprocess
import sys


def machine_code(script):
    """Run ``script`` in a process with Triton's compiler, and return the JSON that it prints.

    Args:
        script: Source code. It finds every module that this process finds.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-P", "-c", script]
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)
