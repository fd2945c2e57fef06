"""The same classifier with exact search: what an approximate index is measured against, and attacks search in."""

from __future__ import annotations

import copy

from robustknn.classifiers.base import Classifier, VoterClassifier
from robustknn.classifiers.dknn import DkNN
from robustknn.classifiers.estimator import NeighborEstimator
from robustknn.classifiers.joint import Joint
from robustknn.classifiers.rejecting import Rejecting
from robustknn.errors import InputError


def searches_exactly(classifier: Classifier) -> bool:
    """Whether every voter's neighbors are exact and at hand, so that attacks may take gradients through them."""
    return not isinstance(classifier, VoterClassifier) or all(v.index.differentiable for v in classifier.voters)


def exact_twin(classifier: Classifier) -> Classifier:
    """The classifier with exact indexes over the same references: same rule, same k, same calibration.

    The references' storage is shared, nothing is copied. A classifier that searches exactly is its own twin.

    Raises:
        InputError: a classifier whose parts are not known, so that its index cannot be replaced.
    """
    if searches_exactly(classifier):
        return classifier
    if isinstance(classifier, Rejecting):
        inner = exact_twin(classifier.classifier)
        assert isinstance(inner, DkNN)
        return Rejecting(inner, classifier.threshold)
    if isinstance(classifier, Joint):
        members = {name: exact_twin(member) for name, member in classifier.members.items()}
        return Joint({name: m for name, m in members.items() if isinstance(m, VoterClassifier)})
    if isinstance(classifier, NeighborEstimator):
        return _estimator_twin(classifier)
    raise InputError(
        f"{type(classifier).__name__} decides by an index that is not exact, and how to make one with exact search is "
        "not known for it; build it over an exact index to evaluate it."
    )


def _estimator_twin(classifier: NeighborEstimator) -> NeighborEstimator:
    twin = copy.copy(classifier)
    twin.index = "exact"
    if isinstance(classifier, DkNN) and isinstance(twin, DkNN):
        twin.adopt_calibration(classifier)
    return twin
