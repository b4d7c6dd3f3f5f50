"""Run PEFT's own LoRA tests with stock and with fused layers, and compare them test by test.

    python tests/conformance/run.py
    python tests/conformance/run.py --own     # PEFT's common tests on prefixes, bottlenecks and their mix with LoRA

README.md in this folder says what is run and how to run parts of it. The exit status is 1 if a test passes with stock layers and not
with fused layers and ``known.py`` gives no reason, or if one of the common tests fails on one of peftkit's own methods.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import fake_hub
import outcomes
import own_types

HERE = Path(__file__).resolve().parent
MODES = ("stock", "fused")
TORCH_BLAS = "fused-torch-blas"
PYTEST_RAN = (0, 1, 5)  # all passed, some failed, none selected
NEEDS_MORE_THAN_TINY_MODELS = {
    "test_common_gpu.py",
    "test_gpu_examples.py",
    "test_vision_models.py",
}


def main() -> int:
    arguments = _parse_arguments()
    work = arguments.work.resolve()
    tests = fetch_tests(work)
    hub = work / "hub"
    fake_hub.build(hub)

    suite = Suite(work, hub, tests)
    if arguments.own:
        return _run_own(suite, arguments)
    names = arguments.modules or _modules_about_lora(tests)
    runs = [(mode, name) for name in names for mode in arguments.modes.split(",")]
    if arguments.compare_only:
        runs = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(lambda run: suite.run(*run, [f"tests/{run[1]}"]), runs):
            print(line, flush=True)
    if arguments.modules or arguments.modes != ",".join(MODES):
        return 0  # a part of the suite: nothing to compare yet

    stock, fused = suite.results("stock"), suite.results("fused")
    comparison = outcomes.compare(stock, fused)
    if comparison.regressions:
        print(suite.run(TORCH_BLAS, "lost", comparison.regressions), flush=True)
        comparison = outcomes.compare(stock, fused, suite.results(TORCH_BLAS))
    outcomes.write(arguments.report, comparison, _versions())
    print(f"\nwritten: {arguments.report}\n{comparison.summary()}")
    return 1 if comparison.regressions else 0


def _run_own(suite: "Suite", arguments: argparse.Namespace) -> int:
    """Run the common tests on our own methods; returns 1 if one fails."""
    names = arguments.modules or [f"{name}.py" for name in own_types.TASKS]
    if not arguments.compare_only:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for line in pool.map(lambda name: suite.run("own", name, [f"tests/{name}"]), names):
                print(line, flush=True)
    if arguments.modules:
        return 0  # a part of the tests: no page yet
    own = suite.results("own")
    outcomes.write_own(arguments.report, own, _versions())
    failing = [test for test, outcome in own.outcomes.items() if outcome in ("failed", "error")]
    print(f"\nwritten: {arguments.report}\n{len(failing)} of {len(own.outcomes)} tests fail")
    print("\n".join(failing))
    return 1 if failing else 0


def fetch_tests(work: Path) -> Path:
    """Download the sdist of the installed PEFT, which contains its tests, and unpack the tests.

    Returns:
        The folder that contains ``tests``; it is reused while the PEFT version stays the same.
    """
    name = f"peft-{version('peft')}"
    target = work / name
    if target.exists():
        return target
    work.mkdir(parents=True, exist_ok=True)
    requirement = name.replace("-", "==")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--dest", str(work), requirement], check=True)

    unfinished = work / "unpacking"
    with tarfile.open(work / f"{name}.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
        archive.extractall(unfinished, members=members, filter="data")
    (unfinished / name / "tests" / "__init__.py").touch()
    # Without this file pytest would search the parent folders and use this project's settings.
    (unfinished / name / "pytest.ini").write_text("[pytest]\n")
    (unfinished / name).rename(target)
    unfinished.rmdir()
    return target


@dataclass(frozen=True)
class Suite:
    """PEFT's tests, and the folders in which they run."""

    work: Path
    """Folder for outcomes and logs."""
    hub: Path
    """Used as ``HF_HOME``."""
    tests: Path
    """Folder that contains PEFT's ``tests``."""

    def run(self, mode: str, name: str, targets: list[str]) -> str:
        """Run ``targets`` in a separate pytest process and save the outcomes.

        Args:
            mode: ``stock``, ``fused``, ``fused-torch-blas`` or ``own``.
            name: Name of the files with the outcomes and the log.
            targets: Test modules or test ids, as on pytest's command line.

        Returns:
            One line to print: mode, name, seconds and pytest's last line.
        """
        folder = self._folder(mode)
        folder.mkdir(parents=True, exist_ok=True)
        result, log = folder / f"{name}.json", folder / f"{name}.log"
        result.unlink(missing_ok=True)
        unfinished = result.with_suffix(".unfinished")
        environment = {
            **os.environ,
            "PEFTKIT_CONFORMANCE_MODE": mode,
            "PEFTKIT_CONFORMANCE_OUT": str(unfinished),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "HF_HOME": str(self.hub),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # the models are tiny, and test modules run in parallel
        }
        options = ["-p", "plugin", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, *targets]
        start = time.perf_counter()
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=self.tests, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        closing_line = log.read_text().rstrip().rpartition("\n")[2].strip("= ")
        if done.returncode not in PYTEST_RAN or not unfinished.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode} on {name}; see {log}")
        unfinished.rename(result)
        return f"{mode} {name} {time.perf_counter() - start:.0f} s: {closing_line}"

    def results(self, mode: str) -> outcomes.Results:
        """Merge the saved results of one mode."""
        merged = outcomes.Results({}, 0)
        for path in sorted(self._folder(mode).glob("*.json")):
            one = json.loads(path.read_text())
            merged.outcomes.update(one["outcomes"])
            merged.fused_layers += one["fused_layers"]
            merged.skipped.update(one["skipped"])
        return merged

    def _folder(self, mode: str) -> Path:
        return self.work / "results" / mode


def _modules_about_lora(tests: Path) -> list[str]:
    """Every test module that mentions LoRA, the largest first, so that no worker is idle at the end."""
    modules = [
        path for path in (tests / "tests").glob("test_*.py") if "LoraConfig" in path.read_text()
    ]
    modules.sort(key=lambda path: -path.stat().st_size)
    return [path.name for path in modules if path.name not in NEEDS_MORE_THAN_TINY_MODELS]


def _versions() -> dict[str, str]:
    names = ("peft", "transformers", "torch", "peftkit")
    python = ".".join(map(str, sys.version_info[:3]))
    return {**{name: version(name) for name in names}, "Python": python}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="only these test modules, e.g. test_other.py")
    parser.add_argument("--modes", default=",".join(MODES), help="stock, fused, or both (default)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="test modules to run in parallel"
    )
    parser.add_argument("--own", action="store_true", help="the common tests on our own methods")
    parser.add_argument(
        "--compare-only", action="store_true", help="only compare the existing results"
    )
    parser.add_argument("--work", type=Path, default=Path(".conformance"), help="scratch folder")
    parser.add_argument("--report", type=Path, default=Path("docs/conformance.md"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
