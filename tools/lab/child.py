"""Call a function of the lab in a child process, because Triton either interprets or compiles in one process, never both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

_SCRIPT = """
import contextlib, importlib, json, sys
with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
    module = importlib.import_module("lab." + sys.argv[1])
    result = getattr(module, sys.argv[2])(**json.load(sys.stdin))
json.dump(result, sys.stdout)
"""


def call(module: str, function: str, *, interpret: bool, **arguments: Any) -> Any:
    """The result of a function of ``lab``; arguments and result are plain data.

    Args:
        module: Name of the module within the lab.
        function: Name of the function.
        interpret: Whether kernels run in Triton's interpreter. If false, they can be compiled.
        arguments: Arguments of the function.

    Raises:
        ValueError: Triton is not installed.
        RuntimeError: The child process failed; its stderr says why.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "Triton is not installed, so kernels can be neither interpreted nor compiled; on Linux run: "
            "pip install triton"
        )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    # the child imports the lab from the same path as this process, and nothing from the working directory
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, module, function],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        env=env,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function} failed in a child process; the error is above")
    return json.loads(done.stdout)
