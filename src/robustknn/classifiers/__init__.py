"""Classifiers that decide by nearest neighbors."""

from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier, check_classifier, named_classes
from robustknn.classifiers.daeknn import WAD, WAT, DAEkNN
from robustknn.classifiers.dknn import DkNN, ReliabilityBin
from robustknn.classifiers.estimator import NeighborEstimator
from robustknn.classifiers.exact_twin import exact_twin, searches_exactly
from robustknn.classifiers.function import FunctionClassifier
from robustknn.classifiers.input_transforms import JPEG, BitDepth, InputTransform, RandomCrop, TotalVariation
from robustknn.classifiers.joint import Joint, WidestMargin
from robustknn.classifiers.knn import KNN
from robustknn.classifiers.network import Network
from robustknn.classifiers.own_index import knn_from_index
from robustknn.classifiers.rails import RAILS
from robustknn.classifiers.randomized import Randomized
from robustknn.classifiers.rejecting import REJECTED, Rejecting
from robustknn.classifiers.retrieval import PayloadMean, RetrievalClassifier
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
from robustknn.classifiers.saved import Saved, load_classifier
from robustknn.classifiers.set_weights import SetWeighted
from robustknn.classifiers.transformed import Transformed
from robustknn.classifiers.under_noise import GaussianNoise, UnderNoise
from robustknn.classifiers.voters import Voter

__all__ = [
    "JPEG",
    "KNN",
    "RAILS",
    "REJECTED",
    "TIE",
    "WAD",
    "WAT",
    "BitDepth",
    "Classifier",
    "DAEkNN",
    "DkNN",
    "FunctionClassifier",
    "GaussianNoise",
    "InputTransform",
    "Joint",
    "Look",
    "NeighborEstimator",
    "Network",
    "PayloadMean",
    "RandomCrop",
    "Randomized",
    "Rejecting",
    "ReliabilityBin",
    "Request",
    "RetrievalClassifier",
    "Rule",
    "Saved",
    "SetWeighted",
    "TotalVariation",
    "Transformed",
    "UnderNoise",
    "VoteShare",
    "Voter",
    "VoterClassifier",
    "Votes",
    "WidestMargin",
    "check_classifier",
    "decide",
    "exact_twin",
    "knn_from_index",
    "load_classifier",
    "margin",
    "named_classes",
    "searches_exactly",
    "strictly_lost",
    "strictly_won",
]
