"""Start ``peftkit train`` in two processes, with faults in one of them if a test asks for it.

torchrun starts this file as a script. Faults and counts are in ``PEFTKIT_TEST``, a dictionary in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 150


def torchrun(*arguments: Any, code: int = 0, **wanted: Any) -> str:
    """Run ``peftkit`` with the arguments in two processes; returns what both printed.

    Args:
        arguments: Arguments of the command ``peftkit``.
        code: The exit status of torchrun.
        wanted: ``error=N`` or ``kill=N``: the second process fails, or is killed, in step N. ``counts=FILE``: the first process writes
            how often the fused loss ran, and PEFT's own forward of a linear in training. ``plain_views=True``: views of images are the
            images themselves.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(__file__, *map(str, arguments)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PEFTKIT_TEST": json.dumps(wanted, default=str)},
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def _plant(wanted: dict[str, Any]) -> dict[str, int]:
    """Put the faults and the counters in place."""
    import peftkit.fuse.linear as linear
    import peftkit.fuse.loss.lazy as lazy
    from peftkit.errors import ContractError
    from peftkit.finetune.tasks.contrastive_images import ContrastiveImages
    from peftkit.finetune.trainer import RecipeTrainer

    counts = {"loss": 0, "stock": 0}
    step, loss, fallback = (
        RecipeTrainer.training_step,
        lazy.linear_cross_entropy,
        linear.require_merged,
    )

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = self.state.global_step + 1
        if os.environ["RANK"] == "1" and now == wanted.get("error"):
            raise ContractError("the second process has failed")
        if os.environ["RANK"] == "1" and now == wanted.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    def counted_loss(*args: Any, **kwargs: Any) -> Any:
        counts["loss"] += 1
        return loss(*args, **kwargs)

    def counted_fallback(layer: Any, reason: Any) -> Any:
        # A fused linear calls this before it runs PEFT's forward.
        counts["stock"] += layer.training
        return fallback(layer, reason)

    if "plain_views" in wanted:
        ContrastiveImages._view = lambda self, image, draws: image  # type: ignore[method-assign]
    RecipeTrainer.training_step = faulty  # type: ignore[method-assign]
    lazy.linear_cross_entropy = counted_loss
    linear.require_merged = counted_fallback
    return counts


if __name__ == "__main__":
    from peftkit.cli.main import app

    asked = json.loads(os.environ["PEFTKIT_TEST"])
    found = _plant(asked)
    try:
        app(prog_name="peftkit")
    finally:
        if os.environ["RANK"] == "0" and "counts" in asked:
            Path(asked["counts"]).write_text(json.dumps(found))
