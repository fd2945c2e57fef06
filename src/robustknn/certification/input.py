"""Certificates of a kNN on raw inputs: the geometry of features, where the features are the input itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.certification.base import Certified
from robustknn.certification.bisectors_certifier import SEVERAL, TIES, FeatureBisector
from robustknn.certification.bisectors_scene import ByGeometry, decisions, standing
from robustknn.certification.exact import FeatureExact, nearest_moves
from robustknn.checks import Bounds
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.threat import ThreatModel

UNIT = "L2 of the input"
_FIXED = ("The references are fixed and trusted.", TIES)


@registry.certifiers.register("input")
@dataclass(frozen=True)
class InputCertificate(ByGeometry):
    """How far an input may move, in L2, before the decision of a kNN on raw inputs can change.

    For one neighbor the least move is found exactly ("feature-exact"), for several a bound ("feature-bisector").

    Args:
        bounds: the least and the greatest value that a moved input may take; the least move within them is longer,
            for one neighbor and L2. None for any value.
        nearest, visits, upper, pivots: see `FeatureBisector`.
        programs: see `FeatureExact`.
    """

    name: ClassVar[str] = "input"
    unit: ClassVar[str] = UNIT

    bounds: Bounds | None = None
    nearest: int | None = 128
    visits: int | None = 1024
    upper: str = "straight"
    pivots: int = 10
    programs: int = 10_000

    def __post_init__(self) -> None:
        _ = self._bisector, self._exact  # which refuse what they cannot use
        if self.bounds is not None:
            object.__setattr__(self, "bounds", ThreatModel("l2", 0.0, self.bounds).bounds)

    @property
    def _bisector(self) -> FeatureBisector:
        return FeatureBisector(self.nearest, self.visits, self.upper, self.pivots)

    @property
    def _exact(self) -> FeatureExact:
        return FeatureExact(self.programs)

    def objection(self, classifier: VoterClassifier) -> str | None:
        if not is_raw(classifier.extractor):
            return "its features are not the input itself; use a 'feature-…' certificate, or 'lipschitz'."
        if len(classifier.voters) > 1:
            return SEVERAL
        (voter,) = classifier.voters
        if self.bounds is not None and (voter.n_neighbors, voter.metric) != (1, "l2"):
            return "bounds are used for one neighbor and L2 alone; leave bounds out."
        return None

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        (voter,) = classifier.voters
        if voter.n_neighbors > 1:
            found = self._bisector.certify(classifier, x, sample_ids, seed, progress)
            return Certified(found.labels, found.radius, UNIT, _FIXED, found.upper)
        features, labels, leads = decisions(classifier, x)
        radii, upper = nearest_moves(voter, features[voter.layer], labels, self.programs, self.bounds, progress)
        within = () if self.bounds is None else (f"A moved input stays within {list(self.bounds)}.",)
        return Certified(labels, standing(radii, leads), UNIT, (*_FIXED, *within), torch.where(leads, upper, 0.0))


def as_it_is(extractor: FeatureExtractor) -> bool:
    """Whether features are what layers give, flattened."""
    further = extractor.transform or extractor.normalize or extractor.center
    return not further and set(extractor.pool.values()) == {"flatten"}


def is_raw(extractor: FeatureExtractor | None) -> bool:
    """Whether features are the input, flattened."""
    if extractor is None or not as_it_is(extractor):
        return False
    parts = [module for module in extractor.model.modules() if not isinstance(module, nn.Sequential)]
    return all(isinstance(module, (nn.Identity, nn.Flatten, nn.Dropout)) for module in parts)
