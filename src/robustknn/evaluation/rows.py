"""What the rows of a run say of a batch, and what its header says of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks import AttackResult
from robustknn.attacks.base import padded_rows
from robustknn.classifiers import Classifier, DkNN, Look, VoterClassifier
from robustknn.classifiers.rules import TIE
from robustknn.classifiers.voters import Voter
from robustknn.evaluation.approximation import settings_of
from robustknn.reference import ReferenceSet

SHOWN_NEIGHBORS = 8
REJECTED_SHARES = (0.01, 0.05, 0.1)
"""Shares of the calibration samples by which thresholds on credibility are set for the summary."""


def look_at(classifier: Classifier, x: Tensor, ids: Tensor) -> tuple[Tensor, Look | None]:
    if isinstance(classifier, VoterClassifier):
        look = classifier.look(x)
        return look.scores, look
    return classifier.scores(x, ids.to(x.device)), None


def decision_columns(classifier: Classifier, scores: Tensor, look: Look | None, y: Tensor) -> dict[str, Any]:
    prediction = classifier.decide(scores).cpu()
    columns: dict[str, Any] = {"prediction": prediction, "correct": prediction == y}
    columns["margin"] = classifier.lead(scores, y.to(scores.device)).cpu().double()
    if look is not None and isinstance(classifier, VoterClassifier):
        columns |= {name: value.cpu().double() for name, value in classifier.details(look).items()}
    return columns


def attack_columns(result: AttackResult) -> dict[str, Any]:
    return {
        "clean_correct": (result.clean_labels == result.y).cpu(),
        "success": result.success.cpu(),
        "robust": result.robust.cpu(),
        "l2": result.l2.cpu().double(),
        "linf": result.linf.cpu().double(),
        "gradient_passes": result.gradient_passes.cpu(),
        "forward_passes": result.forward_passes.cpu(),
        "zero_gradient": result.zero_gradient.cpu(),
    }


@torch.no_grad()
def succeeds_rounded(classifier: Classifier, result: AttackResult, ids: Tensor) -> Tensor:
    """Whether the examples that succeed still do as 8-bit images, (N,) bool."""
    survives = result.success.clone()
    rows = padded_rows(result.success.nonzero()[:, 0])
    if len(rows):
        rounded = (result.x_adv[rows] * 255).round() / 255
        scores, _ = look_at(classifier, rounded, ids.to(rows.device)[rows])
        survives[rows] = classifier.lead(scores, result.y[rows]) < -TIE
    return survives


def shown_tensors(positions: Tensor, shown: Tensor, x: Tensor, look: Look | None) -> dict[str, Tensor]:
    """Example and nearest neighbors of the samples that the report shows."""
    mask = shown.to(x.device)
    tensors = {"position": positions, "x": x[mask].cpu()}
    for place, (voter, found) in enumerate((look.nearest if look is not None else {}).items()):
        near = found.first(min(voter.n_neighbors, SHOWN_NEIGHBORS))
        tensors[f"ids {place}"] = near.ids[mask].cpu()
        tensors[f"distances {place}"] = near.distances[mask].cpu()
        tensors[f"labels {place}"] = voter.labels_of(near.ids[mask]).cpu()
    return tensors


def voters_of(classifier: Classifier) -> tuple[Voter, ...]:
    return classifier.voters if isinstance(classifier, VoterClassifier) else ()


def _attacked(references: ReferenceSet) -> str | None:
    """What adversarial references were made by, in words; None for clean ones."""
    made = references.made_by
    if made is None:
        return None
    eps = made["threat"]["eps"]
    radius = "several radii" if isinstance(eps, list) else f"{eps:.4g}"
    return f"adversarial, {made['attack']['name']}, {made['threat']['norm']} {radius}"


def described(classifier: Classifier, banks: list[ReferenceSet]) -> dict[str, Any]:
    """What the report says of a classifier, as JSON; `bank` is the place of a voter's references in the gallery."""
    said: dict[str, Any] = {"type": type(classifier).__name__, "n_classes": classifier.n_classes}
    if isinstance(classifier, DkNN) and classifier.is_calibrated:
        shares = {share: classifier.rejection_threshold(share) for share in REJECTED_SHARES}
        said["rejection"] = [{"share": s, "threshold": t} for s, t in shares.items()]
    if classifier.extractor is not None:
        said["model"] = type(classifier.extractor.model).__name__
    said["voters"] = [
        {
            "layer": v.layer,
            "n_neighbors": v.n_neighbors,
            "metric": v.metric,
            "references": len(v.references),
            "dim": v.index.dim,
            "index": type(v.index).__name__,
            "exact": v.index.exact,
            "engine": registry.indexes.name_of(type(v.index)) or type(v.index).__name__,
            "settings": settings_of(v.index),
            "bank": banks.index(v.references),
            "attacked": _attacked(v.references),
        }
        for v in voters_of(classifier)
    ]
    return said
