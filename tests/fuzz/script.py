"""A failing case as a script that prints both values."""

import pprint
from pathlib import Path

from fuzz.build import Case
from fuzz.compare import examine, is_random
from fuzz.execute import run

_TEMPLATE = '''"""{finding}"""

import sys

sys.path.insert(0, {tests!r})
from fuzz.script import show

CASE = {case}

show(CASE)
'''


def write(folder: Path, case: Case, finding: str) -> Path:
    """Write ``fail_<seed>.py`` into ``folder`` and return its path; a number is added if there is one already."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _TEMPLATE.format(
        finding=finding.replace("\\", "/").replace('"""', "'''"),
        tests=str(Path(__file__).parents[1]),
        case=pprint.pformat(case, width=100, sort_dicts=False),
    )
    path, number = folder / f"fail_{case['seed']}.py", 1
    while path.exists():
        number += 1
        path = folder / f"fail_{case['seed']}_{number}.py"
    path.write_text(text, encoding="utf-8")
    return path


def show(case: Case) -> None:
    """Print what stock PEFT and the fused model give for a case, and the verdict."""
    stock, fused = run(case, "stock"), run(case, "fused")
    print(f"stock PEFT raises: {stock.error}\nfused raises:      {fused.error}")
    for name in sorted(stock.values.keys() | fused.values.keys()):
        values = [outcome.values.get(name) for outcome in (stock, fused)]
        shown = ["nothing" if v is None else f"{v.double().norm().item():.9g}" for v in values]
        print(f"{name}: norm {shown[0]} by stock PEFT, {shown[1]} fused")
    if fused.report is not None:
        print(fused.report)
    if is_random(case):
        print("the model draws random numbers here, so its values are not compared")
    print(examine(case) or "no disagreement")
