"""``peftkit_kernels`` in the layout of the Hugging Face kernels hub (``make kernels-hub``)."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels_hub

ROOT = Path(__file__).parents[1]
FIELDS = {
    "general": {"name", "version", "edition", "license", "backends"},
    "torch-noarch": {"pyext"},
}
"""The fields of ``build.toml`` that kernel-builder requires in edition 5, and the optional ``pyext``. It refuses unknown ones."""

USE = """
import torch

names = kernel.LoRA, kernel.lora_linear, kernel.nf4_linear, kernel.quantize_nf4
assert all(name.__module__.startswith(kernel.__name__ + ".") for name in names)
assert "peftkit_kernels" not in sys.modules
torch.manual_seed(0)
x, W = torch.randn(5, 64), torch.randn(32, 64)
A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
lora = kernel.LoRA(A, B, 0.5, 0.0, 0)
y = kernel.lora_linear(x, W, None, lora, backend="torch")
plain = kernel.lora_linear(x, W, None, lora, backend="reference")
torch.testing.assert_close(y, plain)
for grad, expected in zip(torch.autograd.grad(y.sum(), (A, B)), torch.autograd.grad(plain.sum(), (A, B))):
    torch.testing.assert_close(grad, expected)
weight = kernel.quantize_nf4(W)
kernel.nf4_linear(x, weight, None, lora, backend="torch")
import importlib
importlib.import_module(kernel.__name__ + ".storage.nf4.triton_impl")
print(sorted(name for name in dir(torch.ops) if "peftkit" in name))
print(kernel.__name__)
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "peftkit-kernels"
    kernels_hub.assemble(out)
    return out


def child(code: str, *arguments: object) -> list[str]:
    """The lines that a fresh interpreter prints, outside of the repository."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "import sys\n" + code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(sys.prefix), env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_build_toml_has_the_fields_that_kernel_builder_knows(layout):
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    found = tomllib.loads((layout / "build.toml").read_text(encoding="utf-8"))
    assert {section: set(values) for section, values in found.items()} == FIELDS
    general = found["general"]
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert (layout / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()
    assert {f"torch-{name}" for name in general["backends"]} == {
        path.name for path in (layout / "build").iterdir()
    }


def test_the_sources_are_complete_and_import_the_package_relatively_only(layout):
    sources = layout / "torch-ext" / "peftkit_kernels"
    original = ROOT / "kernels" / "peftkit_kernels"
    names = {p.relative_to(sources) for p in sources.rglob("*") if p.is_file()}
    assert names == {
        p.relative_to(original) for p in original.rglob("*") if p.suffix in (".py", ".c", ".h")
    }
    for path in sources.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) peftkit", text, flags=re.MULTILINE), path
        compile(text, str(path), "exec")
    assert not any(path.is_symlink() for path in layout.rglob("*"))


def test_imports_of_a_form_that_cannot_be_made_relative_are_refused():
    text = "    from peftkit_kernels.core.plan import (\n        Plans,\n    )\n"
    expected = text.replace("peftkit_kernels.core", "..core")
    assert kernels_hub.relative_imports(text, 2) == expected
    assert kernels_hub.relative_imports("from peftkit_kernels import gemm\n", 1) == (
        "from . import gemm\n"
    )
    with pytest.raises(ValueError, match=r"'import peftkit_kernels\.gemm' cannot be made relative"):
        kernels_hub.relative_imports("import peftkit_kernels.gemm\n", 1)


def test_the_metadata_has_the_digest_of_every_file(layout):
    identifiers = set()
    for variant in (layout / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        assert metadata["id"].isidentifier()
        identifiers.add(metadata["id"])
        files = {
            path.relative_to(variant).as_posix(): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in variant.rglob("*")
            if path.is_file() and path.name != "metadata.json"
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": files}
    assert len(identifiers) == 2


def test_a_variant_can_be_imported_from_its_folder_under_any_name(layout):
    code = """
import importlib.util
spec = importlib.util.spec_from_file_location("some_kernel_1", sys.argv[1] + "/__init__.py")
kernel = sys.modules["some_kernel_1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
    namespaces, name = child(code + USE, layout / "build" / "torch-cpu")
    assert name == "some_kernel_1"
    metadata = json.loads((layout / "build" / "torch-cpu" / "metadata.json").read_text())
    assert namespaces == str([metadata["id"]])


def test_an_older_layout_is_replaced_and_other_folders_are_not(tmp_path):
    kernels_hub.assemble(tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    kernels_hub.assemble(tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists and has no build"):
        kernels_hub.assemble(tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}


@pytest.mark.slow
def test_the_package_kernels_loads_it(layout, tmp_path):
    """Needs a package index. ``kernels`` is not installed with the tests, because transformers behaves differently with it."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pin,) = re.findall(r"^kernels==.+$", pins, flags=re.MULTILINE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), pin]
    subprocess.run(install, check=True, capture_output=True)
    code = """
sys.path.append(sys.argv[2])
from pathlib import Path
import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
build = Build.open(sys.argv[1])
assert [str(backend) for backend in build.general.backends] == ["cpu", "cuda"]
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
variant = Path(kernel.__file__).parent
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
assert kernel.__name__ == metadata.id
"""
    namespaces, name = child(code + USE, layout, tmp_path)
    assert namespaces == str([name])
