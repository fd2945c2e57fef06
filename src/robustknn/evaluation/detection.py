"""Detecting adversarial inputs by a score, such as DkNN's credibility or the distance to the neighbors.

Two questions. How well do the scores of clean and of adversarial inputs separate at any threshold (ROC, AUC)? And what
does a threshold catch that was chosen beforehand, on calibration data, to reject a stated share of clean inputs? The
second is what a detector does; the first is what it could do if the adversarial scores were known.

Detection of examples that were not made against the detector says little: see `robustknn.attacks.Credible` and
`robustknn.classifiers.Rejecting` for those that were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustknn.checks import as_tensor, check_choice, check_number, check_positive_int
from robustknn.classifiers import DkNN, VoterClassifier
from robustknn.errors import InputError, brief
from robustknn.evaluation import metrics

SHARES = (0.01, 0.05, 0.1)
SUSPICIOUS = ("low", "high")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ROC:
    """Detection against false alarms, from no input rejected to all.

    Attributes:
        thresholds: (M,) the score from which on (inclusive) an input is rejected; infinite for none.
        false_positive_rate: (M,) share of the clean inputs rejected, ascending.
        detection_rate: (M,) share of the adversarial inputs rejected.
    """

    thresholds: Floats
    false_positive_rate: Floats
    detection_rate: Floats

    @property
    def auc(self) -> float:
        """The area under the curve: how often an adversarial input is more suspicious than a clean one, ties half."""
        heights = (self.detection_rate[1:] + self.detection_rate[:-1]) / 2
        return float(np.sum(np.diff(self.false_positive_rate) * heights))


@dataclass(frozen=True)
class DetectionPoint:
    """What a threshold from calibration data rejects.

    Attributes:
        share: of the calibration samples, rejected at most.
        threshold: of the score; what is beyond it is rejected, what equals it is not.
        clean_rejected: the share of the clean inputs rejected.
        detected: the share of the adversarial inputs rejected.
        detected_interval: its 95 % interval (Wilson).
    """

    share: float
    threshold: float
    clean_rejected: float
    detected: float
    detected_interval: tuple[float, float]


@dataclass(frozen=True)
class Detection:
    """How a score detects: its ROC, and the thresholds that calibration data give.

    Attributes:
        roc: over all thresholds, from the clean and adversarial inputs themselves.
        points: one for each share.
        n_clean, n_adversarial: how many inputs.
    """

    roc: ROC
    points: tuple[DetectionPoint, ...]
    n_clean: int
    n_adversarial: int

    def to_markdown(self) -> str:
        """A table, in per cent, with the AUC in its last line."""
        lines = ["| calibration rejected | clean rejected | detected | 95 % |", "|---:|---:|---:|---|"]
        for p in self.points:
            low, high = (f"{100 * v:.1f}" for v in p.detected_interval)
            lines.append(
                f"| {100 * p.share:g} | {100 * p.clean_rejected:.1f} | {100 * p.detected:.1f} | {low}–{high} |"
            )
        return "\n".join([*lines, f"\nAUC {self.roc.auc:.3f} ({self.n_clean} clean, {self.n_adversarial} adversarial)"])


def roc(clean: Any, adversarial: Any, *, suspicious: str = "high") -> ROC:
    """The ROC of a score that is to tell adversarial inputs from clean ones.

    Args:
        clean, adversarial: (n,) and (m,) scores.
        suspicious: which end is rejected: "low" (credibility) or "high" (distance).

    Raises:
        InputError: no score on a side, or one that is not a number.
    """
    sign = -1.0 if check_choice(suspicious, SUSPICIOUS, "suspicious") == "low" else 1.0
    negative, positive = (sign * _scores(v, w) for v, w in ((clean, "clean"), (adversarial, "adversarial")))
    values = np.unique(np.concatenate([negative, positive]))[::-1]
    rates = [_at_least(side, values) / len(side) for side in (negative, positive)]
    start = np.zeros(1)
    thresholds = np.concatenate([[np.inf], values])
    return ROC(sign * thresholds, np.concatenate([start, rates[0]]), np.concatenate([start, rates[1]]))


def threshold_at(calibration: Any, share: float, *, suspicious: str = "high") -> float:
    """The strictest threshold beyond which at most this share of the calibration scores lies.

    An input is rejected when its score is beyond it, not when it equals it; for credibility this is
    `DkNN.rejection_threshold`.
    """
    check_number(share, "share", "in [0, 1)", lambda v: 0 <= v < 1)
    sign = -1.0 if check_choice(suspicious, SUSPICIOUS, "suspicious") == "low" else 1.0
    ordered = np.sort(-sign * _scores(calibration, "calibration"))
    return float(-sign * ordered[int(share * len(ordered))])


def detect(
    calibration: Any,
    clean: Any,
    adversarial: Any,
    *,
    suspicious: str = "high",
    shares: Sequence[float] = SHARES,
) -> Detection:
    """How a score detects adversarial inputs, with thresholds from held-out clean inputs.

    Args:
        calibration: (n,) scores of clean inputs that are neither reported on nor references.
        clean, adversarial: (n,), (m,) scores of clean inputs and of examples, usually those that fool the classifier.
        suspicious: which end is rejected, "low" or "high".
        shares: of the calibration inputs, to reject.
    """
    thresholds = [threshold_at(calibration, share, suspicious=suspicious) for share in shares]
    return detect_at(thresholds, shares, clean, adversarial, suspicious=suspicious)


def detect_at(
    thresholds: Sequence[float], shares: Sequence[float], clean: Any, adversarial: Any, *, suspicious: str = "high"
) -> Detection:
    """How a score detects at thresholds that are known.

    Args:
        thresholds: of the score, one for each share.
        shares: of the calibration inputs, that these thresholds reject.
        clean, adversarial: (n,), (m,) scores.
        suspicious: which end is rejected, "low" or "high".
    """
    curve = roc(clean, adversarial, suspicious=suspicious)
    calm, attacked = _scores(clean, "clean"), _scores(adversarial, "adversarial")
    points = []
    for share, threshold in zip(shares, thresholds, strict=True):
        false, true = (s < threshold if suspicious == "low" else s > threshold for s in (calm, attacked))
        interval = metrics.wilson(int(true.sum()), len(true))
        points.append(DetectionPoint(share, threshold, metrics.share(false), metrics.share(true), interval))
    return Detection(curve, tuple(points), len(calm), len(attacked))


def detect_by_credibility(
    classifier: DkNN, clean: Any, adversarial: Any, *, shares: Sequence[float] = SHARES
) -> Detection:
    """How a calibrated DkNN's credibility detects, at the thresholds that its own calibration gives.

    Args:
        clean, adversarial: inputs, (n, …) and (m, …).

    Raises:
        NotReadyError: the classifier is not calibrated.
    """
    if not isinstance(classifier, DkNN):
        raise InputError(f"credibility is a calibrated DkNN's, not that of {brief(classifier)}; use detect.")
    thresholds = [classifier.rejection_threshold(share) for share in shares]
    scores = [classifier.credibility(classifier.place(x)) for x in (clean, adversarial)]
    return detect_at(thresholds, shares, scores[0], scores[1], suspicious="low")


@torch.no_grad()
def neighbor_distance(classifier: VoterClassifier, x: Any, batch_size: int = 256) -> Tensor:
    """How far the k nearest references are, (N,) float64: their mean distance, over layers the geometric mean.

    The geometric mean orders inputs alike in whatever unit a layer measures.

    Raises:
        InputError: a classifier without voters, or by inner products, which are no distances.
    """
    if not isinstance(classifier, VoterClassifier):
        raise InputError(f"{brief(classifier)} has no neighbors; pass a classifier of voters such as KNN or DkNN.")
    if any(v.metric == "ip" for v in classifier.voters):
        raise InputError("inner products are no distances; use metric='l2' or 'cosine'.")
    found = []
    for part in classifier.place(x).split(check_positive_int(batch_size, "batch_size")):
        look = classifier.look(part)
        near = [look.nearest[v].first(v.n_neighbors).distances.double().mean(1) for v in classifier.voters]
        found.append(torch.stack(near).clamp_min(0).log().mean(0).exp())
    return torch.cat(found)


def _scores(values: Any, what: str) -> Floats:
    """One score an input, (n,) float64."""
    scores: Floats = as_tensor(values, f"the {what} scores").detach().cpu().double().numpy()
    if scores.ndim != 1 or not len(scores):
        raise InputError(f"the {what} scores have shape {scores.shape}; pass one number an input, at least one.")
    if np.isnan(scores).any():
        raise InputError(f"the {what} scores hold NaN; leave these inputs out.")
    return scores


def _at_least(scores: Floats, thresholds: Floats) -> Floats:
    """How many scores are at or above each threshold."""
    below: NDArray[np.int64] = np.searchsorted(np.sort(scores), thresholds, side="left")
    counts: Floats = (len(scores) - below).astype(np.float64)
    return counts
