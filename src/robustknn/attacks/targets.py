"""Which wrong classes a targeted run should aim at: the nearest first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.objectives.classes import nearest_classes, winners


def class_requests(classifier: Classifier) -> Sequence[Request]:
    """What `wrong_classes` needs a look to hold: of every class as many references as always win."""
    if not isinstance(classifier, VoterClassifier):
        return ()
    return [Request(v, per_class=v.n_neighbors // 2 + 1) for v in classifier.voters]


def wrong_classes(classifier: Classifier, look: Look | None, scores: Tensor, y: Tensor) -> Tensor:
    """The classes other than y, (N, M): the nearest that can win; by the scores (N, C) where nothing is known of them.

    Args:
        look: with `class_requests`, or None.
    """
    if look is None or not isinstance(classifier, VoterClassifier):
        return ranked_classes(-scores, y)
    found = [look.by_class[v].first(v.n_neighbors // 2 + 1).distances for v in classifier.voters]
    return nearest_classes(found, y, None, winners(classifier))[:, 1:]


def ranked_classes(distances: Tensor, y: Tensor) -> Tensor:
    """The classes other than y by distance, nearest first, (N, C − 1); equal ones by number."""
    own = torch.zeros_like(distances, dtype=torch.bool).scatter_(1, y[:, None], True)
    order = distances.masked_fill(own, float("inf")).argsort(dim=1, stable=True)
    return order[order != y[:, None]].view(len(y), -1)
