"""Compare peftkit with stock PEFT on random cases: ``python tests/fuzz/run.py --minutes 10``.

The exit status is 1 if a case failed, 2 if the arguments do not fit.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--cases", type=int, help="stop after this many cases")
    parser.add_argument("--resume", action="store_true", help="go on where the last run ended")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "fuzz", help="for state and scripts"
    )
    parser.add_argument(
        "--usual", action="store_true", help="only the families named in options.py"
    )
    options = parser.parse_args(arguments)
    if options.minutes is None and options.cases is None:
        options.minutes = 2.0

    from fuzz.session import State, go_on, table
    from fuzz.worker import Worker

    saved = options.out / "state.json"
    if options.resume and not saved.exists():
        parser.error(f"--resume: there is no {saved}; run without --resume first")
    state = State.load(saved) if options.resume else State(options.seed)
    worker = Worker()
    try:
        go_on(
            state,
            worker,
            options.out,
            cases=options.cases,
            minutes=options.minutes,
            every=() if options.usual else every_family(),
        )
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume --out {options.out}")
    finally:
        worker.close()
    print(table(state))
    return 1 if state.failures else 0


def every_family() -> tuple[str, ...]:
    """All model types of transformers that have a class with a head and become small."""
    from fuzz.options import LARGE
    from transformers.models.auto import modeling_auto

    from peftkit.compatibility import tiny

    held = {kind for mapping in tiny._HEADS for kind in getattr(modeling_auto, mapping)}
    return tuple(sorted(held - set(LARGE)))


if __name__ == "__main__":
    sys.exit(main())
