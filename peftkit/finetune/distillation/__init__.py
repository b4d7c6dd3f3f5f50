"""Knowledge distillation: a run learns from the outputs of a larger, frozen model too."""

from peftkit.finetune.distillation.distillation import Distillation, prepare_distillation

__all__ = ["Distillation", "prepare_distillation"]
