"""Starting points of attacks: the nearest references that the classifier takes for another class."""

from __future__ import annotations

import torch
from torch import Tensor

from robustknn.attacks.base import Job
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.errors import InputError
from robustknn.objectives.elsewhere import candidate_requests, candidates
from robustknn.objectives.neighbors import voter_classifier


def start_requests(classifier: Classifier) -> tuple[Request, ...]:
    """The neighbors that `start_images` needs the look at the inputs to hold."""
    return candidate_requests(voter_classifier(classifier, "starting from references").voters)


def check_starts(classifier: Classifier, x: Tensor) -> None:
    """InputError unless the references are at hand as inputs of x's shape (N, …)."""
    known = voter_classifier(classifier, "starting from references")
    references = known.voters[0].references
    if any(v.references is not references for v in known.voters):
        raise InputError("the voters have different references, so none is a starting point; use starts=0.")
    if references.images is not None:
        if references.images.shape[1:] != x.shape[1:]:
            raise InputError(
                f"the reference images have shape {tuple(references.images.shape[1:])}, the inputs "
                f"{tuple(x.shape[1:])}; keep images of that shape, or use starts=0."
            )
    elif not _are_inputs(known, x):
        raise InputError(
            "the references keep no images to start from; build them with keep_images=True, or use starts=0."
        )


@torch.no_grad()
def _are_inputs(classifier: VoterClassifier, x: Tensor) -> bool:
    """Whether the first voter's features are the inputs themselves."""
    layer = classifier.voters[0].layer
    features = classifier.read(x, [layer])[layer]
    return features.shape == x.flatten(1).shape and torch.equal(features, x.flatten(1))


@torch.no_grad()
def start_images(job: Job, rows: Tensor, look: Look, target: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The `count` references nearest to each of some rows that the classifier gives another class, as inputs.

    Nearest in the threat's norm, of those that are nearest in the feature space.

    Args:
        look: at the inputs of these rows, with `start_requests`.
        target: (n,) the wanted classes.

    Returns:
        (n, count, …) and which of them there are, (n, count) bool.
    """
    classifier = voter_classifier(job.classifier, "starting from references")
    x, threat = job.x[rows], job.threat
    found = candidates(classifier, classifier.voters, look, job.y[rows], target)
    images = _images(classifier, found.ids, x)
    delta = (images - x[:, None]).flatten(0, 1)
    distances = threat.distance(delta.double(), torch.zeros_like(delta)).view(found.ids.shape)
    ids = found.nearest(count, distances)
    return threat.clip(_images(classifier, ids, x)), ids >= 0


def _images(classifier: VoterClassifier, ids: Tensor, x: Tensor) -> Tensor:
    """References (n, P) as inputs like x, (n, P, …)."""
    voter = classifier.voters[0]
    held, ids = voter.references, ids.clamp_min(0)
    found = held.rows(voter.layer, ids) if held.images is None else held.image(ids)
    return found.to(x).view(*ids.shape, *x.shape[1:])
