"""Whether the ASK loss follows the kNN's probability of error better than others do, and its bound on information.

Points lie between test images and the examples of four attacks, and along random directions, so that none is on one
objective's own path alone. At each point the hard kNN's probability of error is the share of the k nearest
references that are not of the true class. An objective is as good as its ranks agree with it (Spearman): among all
points, and among the points of one image, which is what an attack climbs.

The instance-wise loss with C balanced classes is a bound on information: p_c is a distribution over classes, so
I(Z; Y) ≥ H(Y) − E[−log p_y] (Barber & Agakov; with one reference a class this is InfoNCE), and a reference of the class
tells no more than the class. The bound is shown at the best temperature of a grid, beside the information of the kNN's
decision about the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from scipy.stats import spearmanr
from sklearn.metrics import mutual_info_score
from torch import Tensor

from robustknn.classifiers import DkNN
from robustknn.classifiers.rules import count_votes
from robustknn.objectives import ASK, CrossEntropy, NeighborHinge, Objective
from robustknn.reproduce.ask_victim import ADV, COMPARED, DIVERGENCE, NETWORK, OURS, PULLED, SW1, SW2, Attacked, chosen
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.daeknn_victim import ADVERSARIAL
from robustknn.reproduce.experiment import Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, scene_of

ENDS = ("random directions", NETWORK, ADV, SW2, OURS)
"""What points lie on the way to."""
SHARES = (0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
OBJECTIVES = (
    "ASK, class-wise, as released",
    "ASK, instance-wise, as released",
    "ASK, the margin here",
    SW1,
    SW2,
    ADV,
    "cross-entropy of the network",
)
BOUND, DECISION, NO_ATTACK = "bound of the ASK loss", "information of the kNN's decision", "no attack"
_FLOOR = 1e-6
"""What the released instance-wise loss adds to a probability."""
_RADII = {"mnist": 80 / 255, "cifar10": 8 / 255}
_OPTIONS = {**COMMON, "n": 200}
_BLOCK = 20


def objectives(victims: Attacked, layers: tuple[int, ...]) -> dict[str, tuple[Objective, bool]]:
    """By name: what is climbed, and whether its neighbors are looked up anew at every point."""
    heads = victims.heads(layers, DIVERGENCE)
    made = (
        (ASK.published(metric="cosine", temperature=0.01), False),
        (ASK.published("instance-wise", metric="cosine"), False),
        (ASK(), True),
        (PULLED, False),
        (NeighborHinge.published(), False),
        (heads, False),
        (CrossEntropy(), False),
    )
    return dict(zip(OBJECTIVES, made, strict=True))


@experiments.register("ask-loss")
class ASKLoss(Experiment):
    """Ranks of objectives against the error of the kNN, and the bound on information."""

    paper, table = "ASK (arXiv 2106.14300)", "the loss"
    title = "How well objectives follow the kNN's probability of error, and the information bound of the ASK loss"
    data = ("mnist", "cifar10")
    presets: ClassVar[Presets] = {"cpu": _OPTIONS, "paper": {**_OPTIONS, "n": 2000}}

    def parts(self, bench: Bench) -> list[Part]:
        victims = Attacked(bench)
        layers = (scene_of(bench).voting[-1],)
        folder = victims.folder("loss", layers, n=victims.n, eps=_RADII[bench.settings.data])
        points = len(SHARES) * len(ENDS) + 1
        each = (sum(COMPARED.values()) + 10 * points) * victims.scene.passes + 0.003 * points
        seconds = each * victims.n * left(folder, victims.n, _BLOCK)
        return [
            *victims.train(ADVERSARIAL),
            Part("points", seconds, lambda _: _summary(_points(victims, layers, folder), victims.source.n_classes)),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        held, made = found["points"], []
        for name in OBJECTIVES:
            ranks = held["ranks"][name]
            made.append(Cell(name, "all points", ranks["all"], held["n"], None, unit="rank correlation"))
            if ranks["within"]:
                made.append(Cell.mean(name, "points of one image", ranks["within"], "rank correlation"))
        for said in (BOUND, DECISION):
            for column in (NO_ATTACK, *ENDS):
                value = held["information"][column][said]
                made.append(Cell(said, column, value, held["images"], None, unit="nats"))
        return made


def _points(victims: Attacked, layers: tuple[int, ...], folder: Path) -> dict[str, Tensor]:
    """Of n images with P points each: objectives' values (n, P, O), the kNN's error (n, P), its decision (n, P), the
    shares of the true class at several temperatures (n, P, T), and the label (n,)."""
    bench, eps = victims.bench, _RADII[victims.bench.settings.data]
    split = victims.split.subset(chosen(len(victims.split), victims.n))
    classifier, threat = victims.dknn(layers), victims.threat.with_eps(eps)
    climbed = objectives(victims, layers)

    def measure(rows: Tensor) -> Mapping[str, Tensor]:
        x, y, ids = (v.to(bench.device) for v in (split.batch(rows), split.labels[rows], split.ids[rows]))
        ends = [threat.random_start(x, ids, bench.seed, "ask loss")]
        for name in ENDS[1:]:
            attack = victims.rival(name, layers, COMPARED[name], full=False)
            ends.append(attack(classifier, x, y, threat, sample_ids=ids, seed=bench.seed).x_adv)
        points = [x, *(x + share * (end - x) for end in ends for share in SHARES)]
        return {"label": y, **_at(classifier, climbed, x, y, points)}

    return by_block(folder, len(split), _BLOCK, measure, bench.progress, "objectives at points")


def _at(
    classifier: DkNN,
    climbed: Mapping[str, tuple[Objective, bool]],
    x: Tensor,
    y: Tensor,
    points: Sequence[Tensor],
) -> dict[str, Tensor]:
    voter = classifier.voters[0]
    bound = {name: objective.bind(classifier) for name, (objective, _) in climbed.items()}
    wanted = [request for each in bound.values() for request in each.requests]
    look = classifier.look(x, wanted)
    fresh = {name: made.start(x, y, None, look) for name, made in bound.items()}
    values, errors, labels, shares = [], [], [], []
    tempered = [ASK.published("instance-wise", metric="cosine", temperature=t).bind(classifier) for t in TEMPERATURES]
    for point in points:
        there = classifier.look(point, [*wanted, *(r for each in tempered for r in each.requests)])
        row = []
        for name, (_, anew) in climbed.items():
            batch = bound[name].start(point, y, None, there) if anew else fresh[name]
            row.append(batch.loss(point).detach())
        votes = count_votes(voter.votes(there.nearest[voter]), classifier.n_classes)
        errors.append(1 - votes.gather(1, y[:, None])[:, 0] / votes.sum(1))
        labels.append(classifier.decide(there.scores))
        values.append(torch.stack(row, 1).double())
        shares.append(torch.stack([-each.start(point, y, None, there).loss(point).detach() for each in tempered], 1))
    stacked = {"values": values, "error": errors, "decision": labels, "share": shares}
    return {name: torch.stack(parts, 1) for name, parts in stacked.items()}


def _summary(found: Mapping[str, Tensor], n_classes: int) -> dict[str, Any]:
    error, ranks = found["error"].double(), {}
    for place, name in enumerate(OBJECTIVES):
        values = found["values"][:, :, place]
        within = [spearman(v, e) for v, e in zip(values, error, strict=True)]
        ranks[name] = {
            "all": spearman(values.flatten(), error.flatten()) or 0.0,
            "within": [round(rank, 6) for rank in within if rank is not None],
        }
    columns = {NO_ATTACK: 0, **{name: len(SHARES) * (place + 1) for place, name in enumerate(ENDS)}}
    information = {
        column: {
            BOUND: information_bound(found["share"][:, place], n_classes),
            DECISION: float(mutual_info_score(found["label"].numpy(), found["decision"][:, place].numpy())),
        }
        for column, place in columns.items()
    }
    return {"n": error.numel(), "images": len(error), "ranks": ranks, "information": information}


# ---------------------------------------------------------------------------------------- statistics


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The rank correlation of two lists (n,); None where one is constant."""
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def information_bound(log_share: Tensor, n_classes: int) -> float:
    """log C + E[log p_y] in nats at the best of several temperatures, no less than 0.

    Args:
        log_share: (n, T), log(p_y + 10⁻⁶) of n samples of C balanced classes; with the floor the shares of all classes
            sum to 1 + C · 10⁻⁶, which is taken off.
    """
    whole = math.log(n_classes) - math.log1p(n_classes * _FLOOR)
    return max(0.0, whole + float(log_share.double().mean(0).max()))
