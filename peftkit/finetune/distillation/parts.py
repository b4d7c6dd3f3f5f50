"""The two parts of a distilled loss, for the log."""

from __future__ import annotations

from torch import Tensor

from peftkit.finetune.processes import from_all


class LossParts:
    """Sums of both parts since the last entry of the log.

    Attributes:
        began: The step before the first one that was added, or ``None`` if nothing was added.
    """

    def __init__(self) -> None:
        self.began: int | None = None
        self._own: Tensor | None = None
        self._taught: Tensor | None = None

    def add(self, own: Tensor, taught: Tensor, step: int) -> None:
        """Add the parts of one forward, as they are added up in a step.

        Args:
            own: The loss of the labels.
            taught: The distance from the teacher.
            step: Number of steps that were done before.
        """
        own, taught = own.detach(), taught.detach()
        if self.began is None or self._own is None or self._taught is None:
            self.began, self._own, self._taught = step, own.clone(), taught.clone()
        else:
            self._own += own
            self._taught += taught

    def take(self, step: int) -> dict[str, float]:
        """The means over the steps until ``step`` and over all processes; the sums start again."""
        assert self.began is not None
        assert self._own is not None
        assert self._taught is not None
        steps = max(1, step - self.began)
        found = from_all((self._own.item() / steps, self._taught.item() / steps))
        own, taught = (sum(values) / len(found) for values in zip(*found, strict=True))
        self.began = self._own = self._taught = None
        return {"label_loss": own, "teacher_loss": taught}
