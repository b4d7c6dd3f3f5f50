"""The code blocks of the documentation's pages, and which of their commands are not run by the tests."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}

SHELL = "bash", "console", "sh", "shell"
DATA = "yaml", "json", "toml", "text"
"""Languages of blocks that are no code."""

NOT_RUN = {
    "git clone": "needs a network",
    "peftkit train recipe.yaml task=sft data.train=rows.jsonl": "is about the model of the page; tests/planning/test_fit.py trains such recipes",
    "make": "the targets take minutes; test_packaging checks that they exist",
    "pip install": "needs a package index",
    "vllm serve": "needs vLLM and a GPU",
    "llama-server": "needs llama.cpp",
    "lm_eval": "needs lm-eval, and downloads its tasks",
    "torchrun": "starts processes and needs GPUs; tests/finetune/test_processes.py starts two on the CPU",
    "peftkit doctor": "compiles the native library in the user's cache; tests/cli/test_doctor.py runs it",
    "peftkit train recipe.yaml out=runs/a resume=true": "the run is finished when the command before it ends",
    "peftkit compare recipe.yaml": "starts processes, which do not see the tests' hub; tests/finetune/test_compare.py runs it",
    "peftkit merge ADAPTER [BASE] OUT": "a synopsis; docs/jsonl-to-server.md has the command with paths",
}
"""The starts of commands that the tests do not run, and why. Every other command of a page is run."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: The number of its first line in the page.
        language: ``"python"``, ``"shell"``, ``"given"`` (a comment of the page) or one of ``DATA``.
        text: The code.
    """

    line: int
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The blocks of a page in order: fenced ones, indented ones (shell), and comments ``<!-- given: CODE -->``.

    Raises:
        ValueError: A fence has no language, or one that this module does not know.
    """
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    in_list = False
    while at < len(lines):
        line = lines[at]
        start = at
        if fence := re.fullmatch(r"(\s*)```(\S*)", line):
            at += 1
            while lines[at].strip() != "```":
                at += 1
            language = "shell" if fence[2] in SHELL else fence[2]
            if language not in ("python", "shell", *DATA):
                raise ValueError(f"line {start + 1}: a block of the language {fence[2]!r}")
            found.append(Block(start + 2, language, "\n".join(lines[start + 1 : at])))
        elif line.startswith("<!-- given:"):
            while not lines[at].endswith("-->"):
                at += 1
            code = "\n".join(lines[start : at + 1])
            code = code.removeprefix("<!-- given:").removesuffix("-->").strip()
            found.append(Block(start + 1, "given", code))
        elif line.startswith("    ") and not in_list and (start == 0 or not lines[start - 1]):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            found.append(Block(start + 1, "shell", "\n".join(x[4:] for x in lines[start:at])))
            continue
        elif line.strip():
            in_list = bool(re.match(r"[-*] |\d+\. ", line)) or (in_list and line.startswith(" "))
        at += 1
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments and prompts."""
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def why_not_run(command: list[str]) -> str | None:
    """Why the tests do not run a command, or ``None`` if they do."""
    text = " ".join(command) + " "
    return next((why for start, why in NOT_RUN.items() if text.startswith(f"{start} ")), None)
