"""What a user gets when installing, importing or running commands of the README."""

import ast
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORT_LIMIT_SECONDS = 0.3


def python(code: str, *, path: str | None = None) -> str:
    """Run ``code`` in a fresh interpreter, with ``path`` as PYTHONPATH, and return what it prints."""
    env = os.environ | ({} if path is None else {"PYTHONPATH": path})
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_light():
    code = """
import sys, time
start = time.perf_counter()
import peftkit
print(time.perf_counter() - start)
print([name for name in ("torch", "transformers", "peft", "numpy", "rich") if name in sys.modules])
"""
    # The fastest of three: a limit on the package, not on what else the machine is doing.
    outputs = [python(code).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) < IMPORT_LIMIT_SECONDS
    assert {loaded for _, loaded in outputs} == {"[]"}


def test_public_names_resolve():
    import peftkit

    values = {name: getattr(peftkit, name) for name in peftkit.__all__}
    assert set(values) == {
        *("ContractError", "LoraConfig", "Report", "__version__", "accelerate", "check"),
        *("explain", "load_adapter", "restore", "wrap", "BottleneckConfig", "PrefixConfig"),
        *("ServingReport", "convert_adapter", "serving_report"),
        *(
            "Comparison",
            "compare",
            "Recipe",
            "RunResult",
            "evaluate",
            "generate",
            "read_recipe",
            "train",
        ),
        *("ExportReport", "export_adapter_gguf", "export_gguf"),
        *("Float8Linear", "from_fp8", "to_fp8"),
        "import_adapter",
        "lora_plus_groups",
        *("BaseReport", "base_report", "load_base", "Float8Linear", "from_fp8", "to_fp8"),
        "merge",
        *("InitReport", "initialise"),
        *("MemoryPlan", "ReportCallback", "Sweep", "fit", "plan", "sweep"),
        *("PruneReport", "prune"),
    }
    assert all(callable(value) for name, value in values.items() if name != "__version__")
    assert dir(peftkit) == sorted(peftkit.__all__)
    assert issubclass(peftkit.ContractError, ValueError)


def test_unknown_name_is_an_attribute_error():
    import peftkit

    with pytest.raises(AttributeError, match="module 'peftkit' has no attribute 'warp'"):
        _ = peftkit.warp


def test_no_module_has_the_name_of_a_public_function():
    import peftkit

    modules = {module.name for module in pkgutil.iter_modules(peftkit.__path__)}
    assert "wrapping" in modules
    assert not modules & set(peftkit.__all__)


def test_type_checkers_see_every_public_name():
    import peftkit

    source = (ROOT / "peftkit" / "__init__.py").read_text()
    block = source.partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    imported = set(re.findall(r"\b\w+\b", " ".join(re.findall(r"import (.+)", block))))
    assert imported == set(peftkit.__all__) - {"__version__"}


def test_public_names_of_the_kernels_resolve_and_import_nothing_before():
    code = """
import sys
import peftkit_kernels
assert "torch" not in sys.modules
assert dir(peftkit_kernels) == sorted(peftkit_kernels.__all__) == sorted(peftkit_kernels._HOME_OF)
for name in peftkit_kernels.__all__:
    value = getattr(peftkit_kernels, name)
    assert callable(value) and value.__doc__, name
    assert value.__module__.startswith(f"peftkit_kernels.{peftkit_kernels._HOME_OF[name]}"), name
print(len(peftkit_kernels.__all__))
"""
    assert int(python(code)) > 30


def test_type_checkers_see_every_public_name_of_the_kernels():
    import peftkit_kernels

    tree = ast.parse((ROOT / "kernels" / "peftkit_kernels" / "__init__.py").read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported = {
        alias.name: node.module
        for node in nodes
        if node.module and node.module.startswith("peftkit_kernels")
        for alias in node.names
    }
    homes = {name: f"peftkit_kernels.{home}" for name, home in peftkit_kernels._HOME_OF.items()}
    assert imported == homes


def test_version_has_one_source():
    import peftkit

    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "peftkit.__version__" }' in text
    assert re.search(r'^version = "', text, flags=re.MULTILINE) is None
    assert re.fullmatch(r"\d+\.\d+\.\d+", peftkit.__version__)


def test_import_changes_nothing_elsewhere():
    code = """
import warnings
warnings.simplefilter("ignore")
import torch, transformers, peft, peft.tuners.lora.layer as layer, transformers.loss.loss_utils as loss

def snapshot():
    return {
        (owner.__name__, name): id(value)
        for owner in (torch, torch.nn.Module, torch.nn.Linear, torch.nn.functional, torch.Tensor,
                      peft, peft.PeftModel, peft.LoraModel, layer, layer.Linear, layer.LoraLayer,
                      transformers.PreTrainedModel, transformers.Trainer, loss)
        for name, value in vars(owner).items()
    }

before, environment = snapshot(), dict(__import__("os").environ)
import peftkit
for name in peftkit.__all__:
    getattr(peftkit, name)
after = snapshot()
print(sorted(key for key in before if before[key] != after.get(key)))
print(dict(__import__("os").environ) == environment)
"""
    assert python(code).splitlines() == ["[]", "True"]


def test_nothing_hides_the_hub_package_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in ("benchmarks", "tools"):
        assert not (ROOT / folder / "kernels.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel built from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # setuptools leaves a build folder and egg-info in the tree it builds; give it a tree of links.
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "peftkit", "kernels", "tools"):
        (tree / name).symlink_to(ROOT / name)
    subprocess.run([*build, "--wheel-dir", str(folder), str(tree)], check=True)
    with zipfile.ZipFile(next(folder.glob("peftkit-*.whl"))) as archive:
        yield archive


def test_wheel_contains_both_packages_and_nothing_else(wheel):
    names = set(wheel.namelist())
    top = {name.partition("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"peftkit", "peftkit_kernels"}
    expected = set()
    for root, package in ((ROOT, "peftkit"), (ROOT / "kernels", "peftkit_kernels")):
        for path in (root / package).rglob("*"):
            if path.suffix in {".py", ".c", ".h", ".typed"}:
                expected.add(path.relative_to(root).as_posix())
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected


def test_wheel_carries_licence_and_dependencies(wheel):
    metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    requirements = re.findall(r"^Requires-Dist: (.+)$", text, flags=re.MULTILINE)
    assert any(n.endswith("/LICENSE") for n in wheel.namelist())
    assert "Requires-Python: >=3.10" in text
    needed = [r for r in requirements if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r).group() for r in needed} >= {"torch", "transformers", "peft"}
    assert not any("<" in r.partition(";")[0] or "==" in r.partition(";")[0] for r in requirements)


def test_imports_keep_their_contracts():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("package", "needs_triton"),
    [
        ("peftkit_kernels", {"kernels", "tiles"}),
        ("lab", {"aot", "interp", "patching", "traffic", "check", "volumes"}),
    ],
)
def test_kernels_and_their_lab_import_without_transformers_peft_and_triton(package, needs_triton):
    code = f"""
import pkgutil, sys
for name in ("transformers", "peft", "triton", "accelerate"):
    sys.modules[name] = None
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if module.name.split(".")[-1] not in {needs_triton}:
        __import__(module.name)
"""
    python(code, path=os.pathsep.join(filter(None, sys.path)))


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)", page.read_text()))
    assert "test" in targets
    assert used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not heading or heading in slugs, heading


def test_ci_runs_make_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines


def test_console_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="peftkit")
    assert command.value == "peftkit.cli.main:app"
