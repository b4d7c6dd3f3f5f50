"""The training loss without the logits, for causal language models that call ``self.loss_function``."""

from peftkit.fuse.loss.install import install_logit_free, logit_free_status, remove_logit_free
from peftkit.fuse.loss.lazy import LazyLogits
from peftkit.fuse.loss.plan import loss_plan

__all__ = [
    "LazyLogits",
    "install_logit_free",
    "logit_free_status",
    "loss_plan",
    "remove_logit_free",
]
