"""What the rows of a run say of the samples of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustknn.attacks import AttackResult
from robustknn.attacks.base import padded_rows
from robustknn.classifiers import Classifier, Look, Randomized, VoterClassifier
from robustknn.classifiers.rules import TIE

SHOWN_NEIGHBORS = 8
"""Of so many of the nearest references the report shows picture, class and distance."""
PATH_POINTS = 11
"""At so many points of the straight line from a sample to its example, both ends among them, its lead is kept."""


def look_at(classifier: Classifier, x: Tensor, ids: Tensor) -> tuple[Tensor, Look | None]:
    """Scores of a batch, and the neighbors behind them where there are any."""
    if isinstance(classifier, VoterClassifier):
        look = classifier.look(x)
        return look.scores, look
    return classifier.scores(x, ids.to(x.device)), None


def decision_columns(classifier: Classifier, scores: Tensor, look: Look | None, y: Tensor) -> dict[str, Any]:
    """What is said of every decision: class, right or wrong, lead, and what its kind of classifier adds."""
    prediction = classifier.decide(scores).cpu()
    columns: dict[str, Any] = {"prediction": prediction, "correct": prediction == y}
    columns["margin"] = classifier.lead(scores, y.to(scores.device)).cpu().double()
    if look is not None and isinstance(classifier, VoterClassifier):
        columns |= {name: value.cpu().double() for name, value in classifier.details(look).items()}
    return columns


def fresh_columns(
    classifier: Classifier, x: Tensor, x_adv: Tensor | None, y: Tensor, ids: Tensor, draws: int
) -> dict[str, Any]:
    """Of a randomized classifier: in which share of draws that no attack has seen it is right, and stays right.

    Args:
        x, x_adv: the samples, placed, and the examples; None for none.
    """
    if not (draws and isinstance(classifier, Randomized) and classifier.random):
        return {}
    y, ids, stands = y.to(x.device), ids.to(x.device), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for fresh in classifier.redrawn(draws):
        right = fresh.decide(fresh.scores(x, ids)) == y
        if x_adv is not None:  # a tie, or no decision, is no win of the attack
            right &= fresh.lead(fresh.scores(x_adv, ids), y) >= -TIE
        stands += right
    return {"fresh": (stands / draws).cpu()}


def attack_columns(result: AttackResult) -> dict[str, Any]:
    """What is said of every attacked sample."""
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
def succeeds_rounded(judge: Classifier, result: AttackResult, ids: Tensor) -> Tensor:
    """Whether the examples that succeed still do as 8-bit images, (N,) bool.

    Args:
        judge: who says what success is, see `Attack.judge`.
    """
    survives = result.success.clone()
    rows = padded_rows(result.success.nonzero()[:, 0])
    if len(rows):
        rounded = (result.x_adv[rows] * 255).round() / 255
        scores, _ = look_at(judge, rounded, ids.to(rows.device)[rows])
        survives[rows] = judge.lead(scores, result.y[rows]) < -TIE
    return survives


def shown_tensors(positions: Tensor, shown: Tensor, x: Tensor, look: Look | None) -> dict[str, Tensor]:
    """Example and nearest neighbors of the samples that the report shows.

    Of voter i: "ids i", "distances i" and "labels i" of the few that are shown, (n, ≤ 8), and "voters i" and "votes i",
    ids and labels of all k that vote, (n, k).
    """
    mask = shown.to(x.device)
    tensors = {"position": positions, "x": x[mask].cpu()}
    for place, (voter, found) in enumerate((look.nearest if look is not None else {}).items()):
        voting = found.first(voter.n_neighbors)
        near = voting.first(min(voter.n_neighbors, SHOWN_NEIGHBORS))
        tensors[f"ids {place}"] = near.ids[mask].cpu()
        tensors[f"distances {place}"] = near.distances[mask].cpu()
        tensors[f"labels {place}"] = voter.labels_of(near.ids[mask]).cpu()
        tensors[f"voters {place}"] = voting.ids[mask].cpu()
        tensors[f"votes {place}"] = voter.labels_of(voting.ids[mask]).cpu()
    return tensors


@torch.no_grad()
def path_tensors(classifier: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The hard decision on the way from samples to their examples: a straight line, not the way the attack took.

    Args:
        x, x_adv: (n, …) samples and examples, placed.
        y, ids: (n,) true classes and sample ids.

    Returns:
        "path lead" and "path decision", (n, PATH_POINTS): from the sample to the example.
    """
    low, high, y = torch.minimum(x, x_adv), torch.maximum(x, x_adv), y.to(x.device)
    leads, decisions = [], []
    for share in torch.linspace(0, 1, PATH_POINTS, dtype=x.dtype, device=x.device):
        scores, _ = look_at(classifier, torch.lerp(x, x_adv, share).clamp(low, high), ids)
        leads.append(classifier.lead(scores, y).cpu().double())
        decisions.append(classifier.decide(scores).cpu())
    return {"path lead": torch.stack(leads, 1), "path decision": torch.stack(decisions, 1)}
