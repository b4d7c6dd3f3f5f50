"""The code of the README and of the pages in ``docs/`` runs, and what the pages say of the library is true.

The blocks of a page run in order, in one namespace and in one folder, with tiny models under the ids of the hub (``docs_hub``). A
comment ``<!-- given: CODE -->`` in a page is run before the block that follows; it makes what the reader is assumed to have.
"""

import ast
import importlib
import json
import re
import sys

import docs_blocks
import docs_hub
import pytest
from docs_blocks import PAGES, ROOT, Block
from typer.testing import CliRunner

import peftkit
import peftkit_kernels

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {letter}"},
            {"role": "assistant", "content": letter * 3},
        ]
    }
    for letter in "abcdefghijklmnopqrstuvwx"
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    docs_hub.build(cache)
    return cache


@pytest.fixture
def reader(hub, tmp_path, monkeypatch, one_thread):
    """A reader's folder: the hub has tiny models, and there are conversations and texts."""
    docs_hub.use(hub, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("chats.jsonl", "more.jsonl", "data/train.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "texts.txt").write_text("".join(f"say {letter} again\n" for letter in "abcdefgh"))


def run(block: Block, page: str, names: dict) -> None:
    """Run a block; an error shows the line of the page."""
    if block.language in ("python", "given"):
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(PAGES[page]), "exec"), names)
    elif block.language == "shell":
        from peftkit.cli.main import app

        for command in docs_blocks.commands(block):
            if docs_blocks.why_not_run(command) is not None:
                continue
            place = f"{page}:{block.line}: {' '.join(command)}"
            assert command[0] == "peftkit", f"{place}: neither run nor listed in NOT_RUN"
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, f"{place}\n{result.output}\n{result.exception!r}"


# PEFT asks the hub whether a base model has changed its vocabulary, even if the model is in the cache.
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, reader):
    names = {"__name__": "__main__"}
    for block in docs_blocks.blocks(PAGES[page].read_text(encoding="utf-8")):
        run(block, page, names)


def test_every_reason_not_to_run_a_command_is_needed():
    unused = set(docs_blocks.NOT_RUN)
    for page in PAGES.values():
        for block in docs_blocks.blocks(page.read_text(encoding="utf-8")):
            if block.language == "shell":
                text = "\n".join(f"{' '.join(words)} " for words in docs_blocks.commands(block))
                unused = {start for start in unused if f"\n{start} " not in f"\n{text}"}
    assert unused == set()


def test_blocks_are_found_in_order_and_unknown_commands_fail(monkeypatch):
    page = """Text

```python
a = 1
```

<!-- given: b = a
c = b -->

    peftkit doctor  # says what to expect
    frobnicate now

- a list

    with an indented paragraph

```bash
make \\
  test
```
"""
    found = docs_blocks.blocks(page)
    assert [(b.line, b.language) for b in found] == [
        (4, "python"),
        (7, "given"),
        (10, "shell"),
        (18, "shell"),
    ]
    assert found[1].text == "b = a\nc = b"
    assert docs_blocks.commands(found[2]) == [["peftkit", "doctor"], ["frobnicate", "now"]]
    assert docs_blocks.commands(found[3]) == [["make", "test"]]
    with pytest.raises(AssertionError, match="10: frobnicate now: neither run nor"):
        run(found[2], "README.md", {})
    with pytest.raises(ValueError, match="line 1: a block of the language ''"):
        docs_blocks.blocks("```\nx\n```")


def raised_and_shown() -> list[str]:
    """Every text in the sources of both packages; parts that differ are "…"."""
    found = []
    for folder in (ROOT / "peftkit", ROOT / "kernels" / "peftkit_kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_the_messages_in_troubleshooting_are_those_of_the_library():
    page = PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`(.+?)`\*\*", page, flags=re.MULTILINE)
    assert len(messages) > 20
    texts = "\n\n".join(text.replace("\n", " ") for text in raised_and_shown())
    own = [message for message in messages if not message.startswith("KeyError")]
    assert [message for message in own if message.strip() not in texts] == []


@pytest.mark.parametrize("package", [peftkit, peftkit_kernels], ids=lambda p: p.__name__)
def test_the_reference_has_every_public_name_once(package):
    page = {"peftkit": "docs/api.md", "peftkit_kernels": "docs/kernels-api.md"}[package.__name__]
    places = re.findall(r"^::: ([\w.]+)$", PAGES[page].read_text(), flags=re.MULTILINE)
    names = [place.rpartition(".")[2] for place in places]
    assert sorted(names) == sorted({*package.__all__} - {"__version__", "LoraConfig"})
    for place in places:
        module, _, name = place.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        assert value is getattr(package, name)
        assert value.__doc__


def test_every_name_in_the_architecture_exists():
    page = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:peftkit|peftkit_kernels)\.[\w.]+)`", page))
    assert len(names) > 30
    for name in names:
        assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or leads to an attribute of one."""
    module, _, rest = name, "", ""
    while module:
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}"
            continue
        for part in filter(None, rest.split(".")):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_a_call_takes_the_way_that_the_architecture_describes(tiny, batch, one_thread):
    """The functions of the page's steps 3 to 8 are called in this order, for a layer without siblings.

    An equal model has run before: what is computed once in a process is no step.
    """
    steps = [
        "peftkit.fuse.linear:forward",
        "peftkit.fuse.linear:peftkit_plan",
        "peftkit.fuse.compute:linear",
        "peftkit_kernels.ops.lora_linear.op:lora_linear",
        "peftkit_kernels.core.dispatch:choose_backend",
        "peftkit_kernels.core.schedule:__call__",
        "peftkit_kernels.ops.lora_linear.schedule:forward",
        "peftkit_kernels.gemm:matmul_nt",
        "peftkit_kernels.core.schedule:save",
        "peftkit_kernels.ops.linear_cross_entropy.op:linear_cross_entropy",
        "peftkit_kernels.ops.lora_linear.schedule:backward",
    ]
    config = peftkit.LoraConfig(r=2, target_modules=["o_proj"])
    peftkit.wrap(tiny("llama"), config)(**batch("llama")).loss.backward()
    model = peftkit.wrap(tiny("llama"), config)
    called = []

    def record(frame, event, _):
        if event == "call":
            called.append(f"{frame.f_globals.get('__name__')}:{frame.f_code.co_name}")

    sys.setprofile(record)
    try:
        model(**batch("llama")).loss.backward()
    finally:
        sys.setprofile(None)
    at = 0
    for step in steps:
        assert step in called[at:], step
        at = called.index(step, at)
    page = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    modules = {step.partition(":")[0].removesuffix(".op") for step in steps}
    assert {module for module in modules if module not in page} == set()
