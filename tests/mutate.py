"""Plant every bug of ``mutations*.py``, run its test, and report the bugs that no test detects.

    python tests/mutate.py            # all of them; takes minutes
    python tests/mutate.py --quick    # one of every kind
    python tests/mutate.py --kernel xent_kernel

The exit status is 1 if a bug is not detected, or if a test fails without a bug. Everything runs in this process: a kernel's source is
changed and compiled, and the result replaces the original.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
from mutation import Mutation
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Run the selected bugs and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one bug of every kind")
    parser.add_argument("--kernel", help="only the bugs of this kernel")
    options = parser.parse_args(arguments)
    wanted = [m for m in MUTATIONS if m.quick or not options.quick]
    wanted = [m for m in wanted if options.kernel in (None, m.kernel)]
    if not wanted:
        kernels = dict.fromkeys(m.kernel for m in MUTATIONS)
        parser.error(f"there is no bug for {options.kernel}; kernels: {', '.join(kernels)}")
    os.chdir(ROOT)
    status, failed = run(*dict.fromkeys(m.test for m in wanted))
    if status is not pytest.ExitCode.OK:
        print(f"without any bug: {status.name}, {failed or 'see the names of the tests'}")
        return 1
    survivors = 0
    for mutation in wanted:
        with planted(mutation):
            status, failed = run(mutation.test)
        caught = status is pytest.ExitCode.TESTS_FAILED
        survivors += not caught
        print(
            f"{'caught' if caught else 'SURVIVED'}  {mutation.name}  by {failed or mutation.test}"
        )
    print(f"{len(wanted) - survivors} of {len(wanted)} bugs caught")
    return int(survivors > 0)


def run(*tests: str) -> tuple[pytest.ExitCode, str]:
    """Run some tests; returns the outcome, and the test that failed first."""
    first = _FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*options, *tests], plugins=[first])
    return pytest.ExitCode(status), first.test


class _FirstFailure:
    """Records the first test that failed, with a short reason."""

    test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.test:
            reason = str(report.longrepr.reprcrash.message).splitlines()[0]
            self.test = f"{report.nodeid.rpartition('::')[2]}: {reason[:100]}"


@contextlib.contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """Inside this context the code of this process has the bug."""
    module = importlib.import_module(f"peftkit_kernels.{mutation.module}")
    before = dict(vars(module))
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads a kernel's source from the file that its code object names
        path = Path(folder) / f"{mutation.kernel}.py"
        path.write_text(mutated_source(Path(module.__file__ or "").read_text(), mutation))
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
        replaced = {name: (before[name], vars(module)[name]) for name in _functions(module, path)}
        _exchange(dict(replaced.values()))
        try:
            yield
        finally:
            _exchange({new: old for old, new in replaced.values()})
            vars(module).update(before)


def _functions(module: ModuleType, path: Path) -> list[str]:
    """Names of the kernels that were compiled from ``path``."""
    found = []
    for name, value in vars(module).items():
        code = getattr(getattr(value, "fn", None), "__code__", None)
        if code is not None and code.co_filename == str(path):
            found.append(name)
    return found


def _exchange(kernels: dict[object, object]) -> None:
    """Replace kernels by others in every module of ``peftkit_kernels`` that has imported them."""
    new = {id(old): value for old, value in kernels.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith("peftkit_kernels"):
            found = {key: new[id(value)] for key, value in vars(module).items() if id(value) in new}
            vars(module).update(found)


def mutated_source(source: str, mutation: Mutation) -> str:
    """``source`` with the bug.

    Raises:
        ValueError: There is no such kernel, or the text to replace does not occur exactly once in the kernel.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == mutation.kernel:
            lines = source.splitlines(keepends=True)
            head, tail = lines[: node.lineno - 1], lines[node.end_lineno :]
            body = "".join(lines[node.lineno - 1 : node.end_lineno])
            if body.count(mutation.old) != 1:
                raise ValueError(
                    f"{mutation.name}: {mutation.old!r} occurs {body.count(mutation.old)} times in the kernel, not once; "
                    "mend the line in tests/mutations*.py"
                )
            return "".join([*head, body.replace(mutation.old, mutation.new), *tail])
    raise ValueError(f"{mutation.name}: there is no kernel {mutation.kernel} in {mutation.module}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
