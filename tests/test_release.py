"""Files for citation, security and release: they parse, and agree with the package."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import peftkit

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def workflow(name: str) -> dict:
    # YAML 1.1 reads the key `on` as true
    found = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in found.items()}


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_citation_agrees_with_the_package():
    """The fields that Citation File Format 1.2.0 requires, and those that pyproject.toml has too."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert (found["cff-version"], found["type"]) == ("1.2.0", "software")
    assert found["version"] == peftkit.__version__
    assert f'license = "{found["license"]}"' in PYPROJECT
    for author in found["authors"]:
        assert f'{{ name = "{author["name"]}" }}' in PYPROJECT


def test_ci_runs_the_command_of_the_readme():
    (job,) = workflow("ci.yml")["jobs"].values()
    assert commands(job) == [".ci/run"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    assert oldest == min(job["strategy"]["matrix"]["python"], key=lambda v: int(v.split(".")[1]))


def test_a_tag_releases_without_a_stored_token():
    found = workflow("release.yml")
    assert found["on"] == {"push": {"tags": ["v*"]}}
    build, publish = found["jobs"]["build"], found["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert found["permissions"] == {"contents": "read"}
    assert [line for line in commands(build) if line.startswith("python -m")] == [
        "python -m pip install build twine",
        "python -m build",
        "python -m twine check --strict dist/*",
    ]
    (upload,) = [s for s in build["steps"] if "upload-artifact" in s.get("uses", "")]
    (download,) = [s for s in publish["steps"] if "download-artifact" in s.get("uses", "")]
    assert upload["with"]["name"] == download["with"]["name"]
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files that ``python -m build`` makes: the source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split("\n") if tracked.returncode == 0 else []
    if not names:
        pytest.skip("the tree is no clone, so the files of a release are not known")
    tree = folder / "tree"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_source_archive_has_what_the_wheel_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    sources = [*ROOT.glob("peftkit/**/*.py"), *ROOT.glob("kernels/peftkit_kernels/**/*.[ch]")]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names


def test_the_wheel_works_outside_of_the_repository(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    code = """
import sys, torch, peftkit, peftkit_kernels
from pathlib import Path
assert Path(peftkit.__file__).parents[1] == Path(peftkit_kernels.__file__).parents[1] == Path(sys.argv[1])
for name in peftkit.__all__:
    getattr(peftkit, name)
from peftkit_kernels import native
assert list(Path(native.__file__).parent.glob("*.c"))
A, B = torch.ones(1, 4), torch.ones(2, 1)
lora = peftkit_kernels.LoRA(A, B, 1.0, 0.0, 0)
print(peftkit_kernels.lora_linear(torch.ones(1, 4), torch.zeros(2, 4), None, lora).tolist())
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{code}", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[4.0, 4.0]]"
