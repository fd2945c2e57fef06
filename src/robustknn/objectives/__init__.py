"""Objectives: differentiable stand-ins for the classifier's error."""

from robustknn.objectives.ask import ASK
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.cross_entropy import CrossEntropy

__all__ = ["ASK", "BatchObjective", "BoundObjective", "CrossEntropy", "Objective"]
