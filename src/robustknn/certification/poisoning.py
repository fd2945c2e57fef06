"""Poisoning: how many references may change before a decision can. The vote gap, made exact (Jia et al., 2012.03765).

The rules and their proofs: `vote_gap` (votes), `payload_gap` (stored probabilities), `weighted_gap` (sets weighted by
distance).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks.base import check_several_classes
from robustknn.certification import payload_gap, vote_gap, weighted_gap
from robustknn.certification.base import Certified, Certifier, refused
from robustknn.checks import check_positive_int
from robustknn.classifiers import Classifier, Look, PayloadMean, Request, VoterClassifier, VoteShare
from robustknn.classifiers.joint import decides_otherwise
from robustknn.classifiers.rules import TIE
from robustknn.classifiers.set_weights import SetWeighted
from robustknn.progress import Progress

TRUSTED = "The network and the way its features are made are fixed and trusted; only references change."
TIES = "A tie counts as failure."
_EXACT = "Exact: one change more can make another class lead or tie."
_SOUND = "Sound, not always tight: more changes may be needed than one beyond the radius."
_RULES = (VoteShare, PayloadMean, SetWeighted)


@dataclass(frozen=True)
class Poisoning(Certifier):
    """Base of the certificates against changed references.

    Args:
        batch_size: samples looked at at once: memory, not results.
    """

    insert: ClassVar[bool]
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_positive_int(self.batch_size, "batch_size")

    def check(self, classifier: Classifier) -> None:
        """Refuse what does not decide by votes of exactly known neighbors alone."""
        if not isinstance(classifier, VoterClassifier):
            raise refused(
                self.name, classifier, "it shows no voting references; pass a KNN, DkNN, DAEkNN or retrieval."
            )
        if decides_otherwise(classifier):
            raise refused(
                self.name, classifier, "it does not decide by its votes alone; certify the classifier inside."
            )
        check_several_classes(classifier)
        rule, voters = classifier.rule, classifier.voters
        if type(rule) not in _RULES:
            raise refused(
                self.name, classifier, f"no bound is known for its rule {type(rule).__name__}; use VoteShare."
            )
        if not all(v.index.exact for v in voters):
            raise refused(self.name, classifier, "its index is approximate; search exactly (index='exact').")
        ks = {v.n_neighbors for v in voters}
        if len(ks) > 1:
            raise refused(self.name, classifier, "its voters have different numbers of neighbors; give them one k.")
        if not isinstance(rule, SetWeighted) and len(classifier.reference_sets) > 1:
            raise refused(self.name, classifier, "its voters have different reference sets; give them one.")
        if isinstance(rule, PayloadMean) and len(voters) > 1:
            raise refused(self.name, classifier, "it averages over several layers; certify each layer by itself.")
        if isinstance(rule, VoteShare) and sum(v.n_neighbors for v in voters) * TIE >= 1:
            raise refused(self.name, classifier, "a single one of so many votes counts as a tie; lower k.")
        if self._by_distance(classifier) and voters[0].metric == "ip":
            raise refused(
                self.name, classifier, "inner products know no nearest place; use another metric or weighting."
            )

    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        labels, radii = [], []
        progress.start(f"certifying ({self.name})", len(x))
        try:
            for part in x.split(self.batch_size):
                decided, radius = self._part(classifier, part)
                labels.append(decided.cpu())
                radii.append(radius.cpu().double())
                progress.advance(len(part))
        finally:
            progress.stop()
        radius = torch.cat(radii)
        exact = self._exact(classifier)
        return Certified(
            torch.cat(labels), radius, self.unit, self._assumptions(classifier), radius + 1 if exact else None
        )

    def _part(self, classifier: VoterClassifier, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decision and radius of some inputs, (n,) each."""
        more = 0 if self.insert or not self._by_distance(classifier) else (classifier.voters[0].n_neighbors - 1) // 2
        look = classifier.look(
            x, [Request(v, nearest=min(v.n_neighbors + more, len(v.references))) for v in classifier.voters]
        )
        y = classifier.decide(look.scores)
        rule = classifier.rule
        if isinstance(rule, SetWeighted):
            return y, self._weighted(classifier, rule, look, y, more)
        votes = [v.votes(look.nearest[v]) for v in classifier.voters]
        if isinstance(rule, PayloadMean):
            payload = votes[0].payload
            assert payload is not None
            return y, payload_gap.largest(rule, payload, classifier.lead(look.scores, y), y, self.insert)
        labels = torch.stack([v.labels for v in votes], 2)
        return y, (vote_gap.inserted if self.insert else vote_gap.modified)(labels, y)

    def _weighted(self, classifier: VoterClassifier, rule: SetWeighted, look: Look, y: Tensor, more: int) -> Tensor:
        votes = [v.votes(look.nearest[v]) for v in classifier.voters]
        wanted = classifier.voters[0].n_neighbors + more
        distances = torch.stack([_padded(look.nearest[v].distances, wanted) for v in classifier.voters], 1)
        labels = torch.stack([v.labels for v in votes], 1)
        shape = (-1, rule.sets)
        return weighted_gap.largest(
            rule,
            rule.set_weights(votes),
            labels.unflatten(1, shape),
            distances.unflatten(1, shape),
            y,
            classifier.n_classes,
            self.insert,
        )

    @staticmethod
    def _by_distance(classifier: VoterClassifier) -> bool:
        rule = classifier.rule
        return isinstance(rule, SetWeighted) and rule.weighting in ("paper", "released")

    def _exact(self, classifier: VoterClassifier) -> bool:
        rule = classifier.rule
        return not isinstance(rule, SetWeighted) and (self.insert or len(classifier.voters) == 1)

    def _assumptions(self, classifier: VoterClassifier) -> tuple[str, ...]:
        rule, several = classifier.rule, len({v.layer for v in classifier.voters}) > 1
        free = "any label and any features" + (", in every layer others" if several else "")
        what = (
            f"At most so many references are inserted, with {free}; none is changed or removed."
            if self.insert
            else f"At most so many references are removed, moved, relabeled or replaced: each gets {free}, or goes."
        )
        said = [TRUSTED, what]
        if isinstance(rule, PayloadMean):
            said.append("A changed reference may carry any probability vector.")
        if isinstance(rule, SetWeighted):
            said.append("A changed sample changes in every reference set, as its adversarial copies are made from it.")
        return (*said, _EXACT if self._exact(classifier) else _SOUND, TIES)


@registry.certifiers.register("poisoning-modify")
@dataclass(frozen=True)
class PoisoningModify(Poisoning):
    """The most references that may be removed, moved, relabeled or replaced without changing the decision."""

    name: ClassVar[str] = "poisoning-modify"
    unit: ClassVar[str] = "references modified"
    insert: ClassVar[bool] = False


@registry.certifiers.register("poisoning-insert")
@dataclass(frozen=True)
class PoisoningInsert(Poisoning):
    """The most references that may be inserted, anywhere and with any label, without changing the decision."""

    name: ClassVar[str] = "poisoning-insert"
    unit: ClassVar[str] = "references inserted"
    insert: ClassVar[bool] = True


def _padded(distances: Tensor, wanted: int) -> Tensor:
    """Distances (N, m) in float64, ∞ for what there is not: (N, wanted)."""
    missing = wanted - distances.shape[1]
    return torch.nn.functional.pad(distances.double(), (0, max(missing, 0)), value=float("inf"))
