"""Objectives: differentiable stand-ins for the classifier's error."""

from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.advknn import AdvKNN
from robustknn.objectives.ask import ASK
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.class_scores import ClassScores
from robustknn.objectives.cross_entropy import CrossEntropy
from robustknn.objectives.dknnb import DkNNB, HeadTraining
from robustknn.objectives.evolved import Evolved
from robustknn.objectives.feature_target import FeatureTarget
from robustknn.objectives.head_training import train_heads
from robustknn.objectives.hinge import NeighborHinge
from robustknn.objectives.knn_stage import KNNStage
from robustknn.objectives.logit_margin import DLR, LogitMargin
from robustknn.objectives.mean import ClassMean
from robustknn.objectives.rank_pair import RankPair
from robustknn.objectives.soft_count import SoftCount
from robustknn.objectives.substitute import NearestSubstitute
from robustknn.objectives.through_noise import ThroughNoise
from robustknn.objectives.through_transform import ThroughTransform

__all__ = [
    "ASK",
    "DLR",
    "Adaptive",
    "AdvKNN",
    "BatchObjective",
    "BoundObjective",
    "ClassMean",
    "ClassScores",
    "CrossEntropy",
    "DkNNB",
    "Evolved",
    "FeatureTarget",
    "HeadTraining",
    "KNNStage",
    "LogitMargin",
    "NearestSubstitute",
    "NeighborHinge",
    "Objective",
    "RankPair",
    "SoftCount",
    "ThroughNoise",
    "ThroughTransform",
    "train_heads",
]
