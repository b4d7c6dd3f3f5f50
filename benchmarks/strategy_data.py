"""The rows of ``strategies.py``: real text and code of installed packages, images of handwritten digits, and the requests of the demo.

Sources are parsed, never imported. Training and held-out rows come from different files, topics or templates, and depend on a fixed seed
and the installed versions only.
"""

from __future__ import annotations

import ast
import gzip
import io
import keyword
import random
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = "datasets matplotlib networkx numpy pandas sympy torch transformers".split()
"""The classes of ``docstrings``: packages that peftkit and its tests need."""
BESIDE = Path(sys.prefix) / "bench-data"
"""Where ``make bench`` puts scikit-learn, of which only a data file is read. In the environment transformers would import it."""


class Rows(NamedTuple):
    """Rows for training and for evaluation."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def requests(train: int, held_out: int) -> Rows:
    """Requests in English and their JSON records; held-out ones have other templates and values."""
    from demo.generator import make_examples

    made = (make_examples("train", train, 0), make_examples("held_out", held_out, 0))
    return Rows(*([{"prompt": e.request, "completion": e.answer} for e in part] for part in made))


def reference(train: int, held_out: int) -> Rows:
    """Topics of Python's language reference; of every fifth one, which is held out, the start."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    known = [{"text": text} for number, text in enumerate(texts) if number % 5 != 4]
    return Rows(known[:train], [{"text": text[:500]} for text in texts[4::5]][:held_out])


def docstrings(train: int, held_out: int) -> Rows:
    """The first paragraphs of docstrings and the package that each is from. Those that name the package are left out."""
    parts: tuple[list[dict[str, Any]], ...] = ([], [])
    for package in PACKAGES:
        for part, size, files in zip(
            parts, (train, held_out), _two_parts(_folder(package)), strict=True
        ):
            texts = _short_texts(files, package)
            part += [
                {"text": t, "label": package} for t in islice(texts, -(-size // len(PACKAGES)))
            ]
    return _drawn(parts, (train, held_out))


def names_in_code(train: int, held_out: int) -> Rows:
    """Functions of the standard library as lists of words, with the role of each name: attribute, global, keyword, local, parameter."""
    return _of_functions(roles_of, (train, held_out))


def descriptions(train: int, held_out: int) -> Rows:
    """First lines of docstrings in the standard library, and the signatures of their functions."""
    return _of_functions(_pair, (train, held_out))


def digits(train: int, held_out: int) -> Rows:
    """Images of 8 x 8 pixels (UCI's optical recognition of handwritten digits); the last ones were written by other people."""
    from PIL import Image

    rows = []
    for line in gzip.decompress(_digits_file().read_bytes()).decode().splitlines():
        *pixels, label = (int(float(number)) for number in line.split(","))
        image = Image.frombytes("L", (8, 8), bytes(min(255, 16 * p) for p in pixels))
        rows.append({"image": image.convert("RGB"), "label": str(label)})
    return Rows(rows[:train], rows[-held_out:])


def roles_of(function: ast.FunctionDef) -> dict[str, Any] | None:
    """The words of a function with one tag each, or ``None`` if it is too long, too short, or has text that cannot be placed."""
    source = ast.unparse(function)
    if not source.isascii() or any(isinstance(n, ast.JoinedStr) for n in ast.walk(function)):
        return None
    places = _places(ast.parse(source).body[0])
    words, tags = [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            continue
        # A text is one word, whatever is in it.
        words.append("text" if token.type == tokenize.STRING else token.string)
        is_name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        role = places.get(token.start) if is_name else None
        tags.append(f"B-{role}" if role else "O")
    return {"tokens": words, "tags": tags} if 15 <= len(words) <= 60 else None


def _places(function: ast.AST) -> dict[tuple[int, int], str]:
    """The role of the name that starts at a line and column."""
    nodes = list(ast.walk(function))
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    assigned = {
        n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    } - parameters
    found = {}
    for node in nodes:
        if isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found[node.lineno, node.col_offset] = "keyword"
        elif isinstance(node, ast.Attribute):
            assert node.end_lineno is not None and node.end_col_offset is not None
            found[node.end_lineno, node.end_col_offset - len(node.attr)] = "attribute"
        elif isinstance(node, ast.Name):
            role = "parameter" if node.id in parameters else "local"
            found[node.lineno, node.col_offset] = (
                role if node.id in parameters | assigned else "global"
            )
    return found


def _pair(node: ast.FunctionDef) -> dict[str, str] | None:
    """A docstring's first line and the signature, without annotations and ``self``."""
    line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    names = [name for name in names if name not in ("self", "cls")]
    if len(line) < 20 or not names or node.name in line or node.name.startswith("__"):
        return None
    return {"anchor": line, "positive": f"{node.name}({', '.join(names)})"}


def _of_functions(
    row_of: Callable[[ast.FunctionDef], dict[str, Any] | None], sizes: tuple[int, int]
) -> Rows:
    """Rows of functions of the standard library, at most twelve of a file."""
    parts = []
    for files, size in zip(_two_parts(_library(), deep=False), sizes, strict=True):
        found = (
            row
            for tree in _trees(files)
            for row in islice(filter(None, map(row_of, _functions(tree))), 12)
        )
        parts.append(list(islice(found, size)))
    return _drawn(parts, sizes)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _short_texts(files: list[Path], package: str) -> Iterator[str]:
    """Different paragraphs that do not name the package, at most eight of a file."""
    seen = set()
    for tree in _trees(files):
        found = [text for text in _paragraphs(tree) if package not in text.lower()]
        yield from (text for text in found[:8] if text not in seen)
        seen |= set(found)


def _paragraphs(tree: ast.AST) -> Iterator[str]:
    """The first paragraphs of docstrings of functions and classes, of 40 to 400 characters, on one line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 40 <= len(text) <= 400:
                yield text


def _trees(files: list[Path]) -> Iterator[ast.Module]:
    for file in files:
        try:
            yield ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates of code, and files for other versions of Python


def _two_parts(folder: Path, most: int = 60, *, deep: bool = True) -> tuple[list[Path], list[Path]]:
    """Files of a folder in a fixed random order: those for training, and every fifth."""
    found = sorted(folder.rglob("*.py") if deep else folder.glob("*.py"))
    found = [f for f in found if "test" not in f.relative_to(folder).as_posix().lower()]
    random.Random(0).shuffle(found)
    return [f for i, f in enumerate(found) if i % 5][: 4 * most], found[::5][:most]


def _drawn(parts: Sequence[list[Any]], sizes: tuple[int, int]) -> Rows:
    """Rows in a fixed random order, as many as wanted.

    Raises:
        SystemExit: There are not enough.
    """
    for rows, size in zip(parts, sizes, strict=True):
        random.Random(0).shuffle(rows)
        if len(rows) < size:
            raise SystemExit(f"the installed sources give {len(rows)} rows, but {size} are needed")
    return Rows(*(rows[:size] for rows, size in zip(parts, sizes, strict=True)))


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; run make bench, which installs it")
    return Path(spec.origin).parent


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _digits_file() -> Path:
    file = BESIDE / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise SystemExit(f"{file} is missing; run make bench, which puts scikit-learn there")
    return file
