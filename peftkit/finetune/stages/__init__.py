"""Stages: several trainings in one recipe, each of which goes on with the weights of the one before."""

from peftkit.finetune.stages.recipe import Stage, StagedRecipe

__all__ = ["Stage", "StagedRecipe"]
