"""Classifiers that decide by nearest neighbors."""

from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.dknn import DkNN, ReliabilityBin
from robustknn.classifiers.estimator import NeighborEstimator, load_classifier
from robustknn.classifiers.knn import KNN
from robustknn.classifiers.rules import (
    TIE,
    Rule,
    Votes,
    VoteShare,
    decide,
    margin,
    strictly_lost,
    strictly_won,
)
from robustknn.classifiers.voters import Voter

__all__ = [
    "KNN",
    "TIE",
    "Classifier",
    "DkNN",
    "Look",
    "NeighborEstimator",
    "ReliabilityBin",
    "Request",
    "Rule",
    "VoteShare",
    "Voter",
    "VoterClassifier",
    "Votes",
    "decide",
    "load_classifier",
    "margin",
    "strictly_lost",
    "strictly_won",
]
