"""A voter's references as the geometry sees them: float64, centered, with a bound on every rounding.

A point is nearer to reference p than to reference n exactly on one side of a hyperplane. What says so is the key of a
reference, K_r(x) = |x − r|² for L2 and 2 − 2⟨x, r⟩ of unit vectors for cosine: K_n(x + d) − K_p(x + d) is linear in d
with gradient 2(p − n), so that the hyperplane is (K_n − K_p) / 2|p − n| away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.certification.base import Certifier, refused
from robustknn.classifiers import Classifier, Voter, VoterClassifier
from robustknn.classifiers.rules import TIE, VoteShare
from robustknn.neighbors import ExactIndex
from robustknn.threat import SLACK

_CHUNK = 4096
_UNIT = torch.finfo(torch.float64).eps / 2


@dataclass(frozen=True)
class Queries:
    """Features of a batch as they are compared.

    Attributes:
        rows: (B, D) float64: centered for L2, at unit length for cosine.
        scale: (B,) what a distance between rows is multiplied by to be one of the features.
        lost: (B,) what the classifier's own rounding of a feature may move it by, in the unit of `rows`.
        slack: (B,) what the difference of two keys may be off by, here and in the classifier's search together.
    """

    rows: Tensor
    scale: Tensor
    lost: Tensor
    slack: Tensor

    def radius(self, row: int, distance: float) -> float:
        """A distance between rows as a radius of the features, rounded down.

        By twice the share that the threat models' own rounding may exceed a radius, so that an attack of ours at the
        certified radius lies inside it.
        """
        if distance == math.inf:
            return distance
        return float(self.scale[row]) * max(0.0, distance - float(self.lost[row])) * (1 - 2 * SLACK)


class Scene:
    """The references of a voter with an exact index, on the CPU. Nothing is copied but a chunk at a time."""

    def __init__(self, voter: Voter) -> None:
        self.index, self.metric = voter.index, voter.index.metric
        self.labels = voter.references.labels.cpu()
        self._classes: dict[int, tuple[Tensor, Tensor]] = {}
        self._class_rows: tuple[int, Tensor] | None = None
        self.center = torch.zeros(self.index.dim, dtype=torch.float64)
        if not self.metric.unit:
            for chunk in self._chunks():
                self.center += self._stored(chunk).sum(0) / len(self)
        self.squares = torch.cat([self.rows(chunk).square().sum(1) for chunk in self._chunks()])
        stored = self._raw(torch.zeros(1, dtype=torch.int64)).dtype
        self.dtype = torch.promote_types(stored, torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def _chunks(self) -> Sequence[Tensor]:
        chunks: Sequence[Tensor] = torch.arange(len(self)).split(_CHUNK)
        return chunks

    def _raw(self, ids: Tensor) -> Tensor:
        if not self.metric.unit:
            return self.index.reconstruct(ids)
        if isinstance(self.index, ExactIndex):  # the very numbers it searches, in whatever type they are stored
            return self.index.vectors.index_select(0, ids.to(self.index.vectors.device))
        return self.index.reconstruct_unit(ids)

    def _stored(self, ids: Tensor) -> Tensor:
        return self._raw(ids).detach().double().cpu()

    def rows(self, ids: Tensor) -> Tensor:
        """References (m, D) float64: centered for L2, at unit length (zero stays zero) for cosine."""
        rows = self._stored(ids)
        return _at_unit_length(rows)[0] if self.metric.unit else rows.sub_(self.center)

    def of_class(self, label: int) -> tuple[Tensor, Tensor]:
        """The ids of the references of a class, and of all others."""
        if label not in self._classes:
            own = self.labels == label
            self._classes[label] = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
        return self._classes[label]

    def class_rows(self, label: int) -> Tensor:
        """The rows of a class (n, D); those of the last class asked for are kept."""
        if self._class_rows is None or self._class_rows[0] != label:
            self._class_rows = label, self.rows(self.of_class(label)[0])
        return self._class_rows[1]

    def place(self, features: Tensor) -> Queries:
        """Features (B, D) as they are compared with the references."""
        wide = features.detach().double().cpu()
        reach = float(self.squares.max().sqrt())
        rounded = torch.finfo(self.dtype).eps * float(torch.finfo(features.dtype).eps < torch.finfo(self.dtype).eps)
        if self.metric.unit:
            rows, lengths = _at_unit_length(wide)
            # At x + d, of at most twice the length, the classifier scales the feature to unit length in its own type.
            lost = torch.full_like(lengths, 2 * torch.finfo(self.dtype).eps + 2 * rounded)
        else:
            rows, lengths = wide - self.center, torch.ones(len(wide), dtype=torch.float64)
            lost = 2 * rounded * (wide.norm(dim=1) + self.center.norm() + reach)
        # A key is off by (D + 3)u of (|q| + |r|)², with both twice as long at most after the move: here in the
        # products, and once more in the classifier's own sums; two keys are compared.
        slack = 32 * (self.index.dim + 8) * _UNIT * (rows.norm(dim=1) + reach).square()
        return Queries(rows, lengths, lost, slack)

    def keys(self, queries: Tensor) -> Tensor:
        """The keys of queries (B, D), as `place` gives them, with all references: (B, n)."""
        return 2 - 2 * self.products(queries) if self.metric.unit else self.squared_distances(queries)

    def squared_distances(self, points: Tensor) -> Tensor:
        """|p − r|² of points (B, D) and all references, (B, n): the keys of L2."""
        own = points.square().sum(1)[:, None]
        return self.products(points).mul_(-2).add_(self.squares).add_(own).clamp_min_(0)

    def products(self, points: Tensor) -> Tensor:
        """⟨p, r⟩ of points (B, D) and all references, (B, n)."""
        out = torch.empty(len(points), len(self), dtype=torch.float64)
        for chunk in self._chunks():
            out[:, chunk[0] : chunk[-1] + 1] = points @ self.rows(chunk).T
        return out


def _at_unit_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    lengths = rows.norm(dim=1)
    return rows / lengths.masked_fill(lengths == 0, 1)[:, None], lengths


class ByGeometry(Certifier):
    """A certifier for votes that are counted, of references whose places are known."""

    def check(self, classifier: Classifier) -> None:
        why = why_not(classifier)
        if why is None and isinstance(classifier, VoterClassifier):
            why = self.objection(classifier)
        if why is not None:
            raise refused(self.name, classifier, why)

    def objection(self, classifier: VoterClassifier) -> str | None:
        """Why it does not hold for a classifier that votes so; None where it does."""
        return None


def why_not(classifier: Classifier) -> str | None:
    """Why a certificate by bisectors does not hold for a classifier; None where it does."""
    return next(_objections(classifier), None)


def _objections(classifier: Classifier) -> Iterator[str]:
    if not isinstance(classifier, VoterClassifier):
        yield "it is not made of voters (its decision is random or unknown); certify the decision by 'smoothing'."
        return
    own = type(classifier)
    if any(getattr(own, name) is not getattr(VoterClassifier, name) for name in ("decide", "lead", "combine", "look")):
        yield "it decides by more than its votes; certify the classifier inside it."
    if type(classifier.rule) is not VoteShare:
        yield f"its rule {type(classifier.rule).__name__} does not count votes; use KNN or DkNN, which do."
    for voter in classifier.voters:
        if not voter.index.exact:
            yield "its index is approximate and may miss a nearer reference; use index='exact'."
        if not voter.index.reconstructs:
            yield "its index does not give its vectors back; use index='exact'."
        if voter.metric not in ("l2", "cosine"):
            yield f"its metric {voter.metric!r} is no distance of features; use metric='l2' or 'cosine'."
    if TIE * sum(voter.n_neighbors for voter in classifier.voters) >= 1:
        yield f"one vote of so many is within the tie of {TIE:g}; use fewer neighbors."


@torch.no_grad()
def decisions(
    classifier: VoterClassifier, x: Tensor, batch_size: int = 256
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features by layer (N, D), decisions (N,) on the CPU, and whether each leads by more than a tie (N,) bool."""
    features: dict[str, list[Tensor]] = {voter.layer: [] for voter in classifier.voters}
    labels, leads = [], []
    for part in x.split(batch_size):
        look = classifier.look(part)
        decided = classifier.decide(look.scores)
        labels.append(decided.cpu())
        leads.append((classifier.lead(look.scores, decided) > TIE).cpu())
        for layer, kept in features.items():
            kept.append(look.features[layer].cpu())
    return {layer: torch.cat(parts) for layer, parts in features.items()}, torch.cat(labels), torch.cat(leads)


def standing(radii: Tensor, leads: Tensor) -> Tensor:
    """Radii (N,) with −1 where not even the sample as it is decides beyond a tie."""
    return torch.where(leads, radii, torch.full_like(radii, -1.0))
