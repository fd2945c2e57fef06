"""Certificates of a kNN on features that move no farther than the input times a known constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.certification.base import Certified, Certifier
from robustknn.certification.bisectors_certifier import FIXED, FeatureBisector
from robustknn.certification.bisectors_scene import ByGeometry
from robustknn.certification.exact import FeatureExact
from robustknn.certification.input import UNIT, as_it_is
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.errors import InputError
from robustknn.models.lipschitz_bounds import lipschitz_bound, rounding
from robustknn.progress import Progress


@registry.certifiers.register("lipschitz")
@dataclass(frozen=True)
class Lipschitz(ByGeometry):
    """How far an input may move, in L2, by the radius of its features over the network's Lipschitz constant.

    The constant is computed from the weights (`robustknn.models.lipschitz_bound`), and what the forward pass may round
    is taken off the radius of the features first.

    Args:
        nearest, visits: see `FeatureBisector`. One neighbor is certified by "feature-exact".
    """

    name: ClassVar[str] = "lipschitz"
    unit: ClassVar[str] = UNIT

    nearest: int | None = 128
    visits: int | None = 1024

    def __post_init__(self) -> None:
        _ = self._bisector

    @property
    def _bisector(self) -> FeatureBisector:
        return FeatureBisector(self.nearest, self.visits, "none")

    def objection(self, classifier: VoterClassifier) -> str | None:
        extractor = classifier.extractor
        if len(classifier.voters) > 1:
            return "it has several voters; use 'feature-votes' with the layers' constants as scales."
        if extractor is None or not as_it_is(extractor):
            return "its features are pooled, transformed, scaled or centered; tap the layer as it is."
        try:
            lipschitz_bound(extractor.model, classifier.voters[0].layer)
        except InputError as error:
            return str(error)
        return None

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        (voter,), extractor = classifier.voters, classifier.extractor
        assert extractor is not None
        within: Certifier = FeatureExact() if voter.n_neighbors == 1 else self._bisector
        found = within.certify(classifier, x, sample_ids, seed, progress)
        L = lipschitz_bound(extractor.model, voter.layer)
        finite = found.radius.masked_fill(found.radius.isinf(), 0.0)
        reach = max(0.0, float(finite.max())) / L
        off = torch.cat([rounding(extractor.model, voter.layer, part, reach) for part in x.split(256)]).cpu()
        # Both the feature of the input and that of the moved input may be off.
        radii = torch.where(found.radius > 0, (found.radius - 2 * off).clamp_min(0) / L, found.radius)
        return Certified(found.labels, radii, UNIT, (*FIXED, f"The network's Lipschitz constant is {L:.6g}, computed."))
