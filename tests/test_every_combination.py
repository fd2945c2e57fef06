"""One table: every optimizer × objective × classifier × norm keeps what all attacks promise.

`make test` runs combinations that cover every pair of parts, `make test-all` all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, RetrievalClassifier, ThreatModel
from robustknn.attacks import Attack, AttackResult, EachTarget, Members
from robustknn.certification import Smoothed, SmoothedEmbedding
from robustknn.classifiers import (
    RAILS,
    TIE,
    BitDepth,
    Classifier,
    DAEkNN,
    FunctionClassifier,
    Joint,
    Network,
    Rejecting,
    Rule,
    Transformed,
    VoterClassifier,
    Votes,
)
from robustknn.objectives import ASK, AdvKNN, NeighborHinge, SoftCount
from robustknn.registry import attacks, objectives

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "bim": {"steps": 3},
    "mi-fgsm": {"steps": 3},
    "pgd": {"steps": 4, "check_every": 2, "restarts": 2},
    "apgd": {"steps": 6, "check_every": 3},
    "minimum-norm": {"steps": 5},
    "tanh-box": {"steps": 6, "search_steps": 2, "check_every": 2},
}
"""Attacks that take any objective, with settings that cost little."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "ask": {},
    "ask, instance-wise": {"kind": "instance-wise", "loss": "cross-entropy"},
    "ask, published": {**vars(ASK.published()), "n_neighbors": 2},
    "cross-entropy": {},
    "logit-margin": {},
    "dlr": {},
    "soft-count": {},
    "soft-count, published": {**vars(SoftCount.published(5)), "guide_layer": "each"},
    "neighbor-hinge": {},
    "neighbor-hinge, published": {**vars(NeighborHinge.published()), "guide_layer": "each"},
    "class-mean": {},
    "nearest-substitute": {},
    "feature-target": {},
    "adaptive": {},
    "adaptive, rival": {"loss": "rival"},
    "rank-pair": {},
    "advknn": {},
    "advknn, published": vars(AdvKNN.published(loss_weights=(20.0, 1.0))),
    "evolved": {},
    "knn-stage": {},
    "through-transform": {},
    "through-noise": {"draws": 4, "look_every": 2},
}
"""By registered name, other forms of one after a comma."""

ALONE: dict[str, Callable[[], Attack]] = {
    "square": lambda: attacks.create("square", queries=6),
    "square on labels": lambda: attacks.create("square", queries=6, feedback="labels"),
    "each target": lambda: EachTarget(attacks.create("pgd", steps=3), targets=2),
    "members": lambda: Members((("one", attacks.create("fgsm")), ("two", attacks.create("square", queries=4)))),
    "credible": lambda: replace(attacks.create("credible"), attack=attacks.create("pgd", steps=3)),
    "transferred": lambda: attacks.create(
        "transferred", source=classifiers()[0]["knn"], attack=attacks.create("pgd", steps=3)
    ),
    "worst-case-fast": lambda: attacks.create("worst-case-fast"),
}
"""Attacks without an objective of their own."""

NAMED: dict[str, dict[str, Any]] = {
    "adaptive": {"steps": 4},
    "advknn": {"steps": 4},
    "advknn-bim": {"steps": 3},
    "advknn-fgsm": {},
    "apgd-ce": {"steps": 5},
    "apgd-dlr": {"steps": 5},
    "apgd-margin": {"steps": 5},
    "ask": {"steps": 4},
    "ask-instance-wise": {"steps": 4},
    "ask-published": {"n_neighbors": 2, "steps": 3},
    "bim-transfer": {"steps": 3},
    "cw-l2": {"steps": 4, "search_steps": 2},
    "feature-target": {"steps": 4},
    "fgsm-transfer": {},
    "mean": {"steps": 4},
    "minimum-norm-thorough": {"steps": 2},
    "nearest-substitute": {"steps": 4},
    "pgd-transfer": {"steps": 3},
    "rank-pair": {"steps": 4},
    "square-labels": {"queries": 6},
    "square-published": {"queries": 6},
    "sw1": {"steps": 4, "search_steps": 2},
    "sw1-published": {"n_guides": 5, "steps": 10, "search_steps": 2},
    "sw2": {"steps": 4, "search_steps": 2},
    "sw2-pgd": {"steps": 3},
    "sw2-published": {"steps": 6, "search_steps": 2, "refresh_every": 2, "check_every": 2},
}
"""Compositions with a name, at settings that cost little, on a DkNN."""

SUITES = ("worst-case", "worst-case-ask-def", "worst-case-thorough")
"""Too long for a table: the rows of their parts stand in it, one batch and single samples in a test of their own."""

NORMS = {"linf": 0.05, "l2": 0.12, "l1": 0.3}
COLUMNS = ("x_adv", "success", "labels", "margin", "gradient_passes", "forward_passes", "winner")


@dataclass(frozen=True)
class ByDistance(Rule):
    """A rule nobody knows: votes weigh less with distance, classes by the stored payload of nobody."""

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        total: Tensor | float = 0.0
        for v in votes:
            weights = v.weights / (1 + torch.where(v.weights > 0, v.distances, torch.zeros_like(v.distances)))
            counts = weights.new_zeros(len(weights), n_classes)
            total = total + counts.scatter_add(1, v.labels, weights)
        assert isinstance(total, Tensor)
        return total


class Weighted(DkNN):
    """A DkNN with that rule."""

    @property
    def rule(self) -> Rule:
        return ByDistance()


@cache
def classifiers() -> tuple[dict[str, Classifier], Tensor, Tensor]:
    # Widths are multiples of 4, where the last bit does not depend on a row's place (see robustknn.features).
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    data = torch.rand(92, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = data[80:]
    noise = torch.rand(80, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    moved = ReferenceSet.build(FeatureExtractor(net, ("1", "3")), (data[:80] + 0.2 * noise, torch.arange(80) % 4))
    references = ReferenceSet.build(
        FeatureExtractor(net, ("1", "3")), (data[:80], torch.arange(80) % 4), payload="softmax", keep_images=True
    )
    dknn = DkNN(references, 5)
    knn = KNN(references, 5, layer="3")
    held = torch.rand(30, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    every: dict[str, Classifier] = {
        "knn": knn,
        "cosine": KNN(references, 4, layer="3", metric="cosine"),
        "ip": KNN(references, 5, layer="1", metric="ip"),
        "one neighbor": KNN(references, 1, layer="1"),
        "dknn": dknn.calibrate(held, torch.arange(30) % 4),
        "weighted": Weighted(references, 5),
        "daeknn": DAEkNN(references, moved, 5),
        "joint": Joint({"knn": knn, "dknn": dknn}),
        "rejecting": Rejecting(dknn, 0.3),
        "retrieval": RetrievalClassifier(references, 5, layer="3"),
        "network": Network(net, 4),
        "transformed": Transformed(net, 4, BitDepth(6)),
        "rails": RAILS(references, layers=["3"], population=16, n_neighbors=2, generations=1, plasma=0.25),
        "smoothed": Smoothed(knn, 0.02, 25),
        "mean feature": SmoothedEmbedding(KNN(references, 5, layer="3", metric="cosine"), 0.05, 10),
        "function": FunctionClassifier(knn.labels, 4, dtype=torch.float64, name="knn"),
    }
    y = torch.stack([c.labels(x) for c in every.values()]).mode(0).values.clamp_min(0)
    return every, x[:7], y[:7]


def make(optimizer: str, objective: str) -> Attack:
    if not objective:
        made: Attack = ALONE[optimizer]() if optimizer in ALONE else attacks.create(optimizer, **NAMED[optimizer])
        return made
    climbed = objectives.create(objective.partition(",")[0], **OBJECTIVES[objective])
    attack: Attack = attacks.create(optimizer, objective=climbed, **OPTIMIZERS[optimizer])
    return attack


def works(objective: str, classifier: str) -> bool:
    """What can be climbed on what: by class scores, by voters, or by what evolves."""
    by_scores = objective in ("cross-entropy", "logit-margin", "dlr")
    forms = "adaptive", "adaptive, rival"
    if classifier == "function":
        return False
    if classifier == "network":
        return by_scores or objective in forms  # of a network the margin of its scores
    own = {"transformed": ("through-transform",), "smoothed": ("through-noise",), "mean feature": ("through-noise",)}
    if classifier in own or objective in ("through-transform", "through-noise"):
        return by_scores or objective in own.get(classifier, ())
    if objective == "feature-target" and classifier == "daeknn":
        return False  # a reference of one set is none of another
    return (objective in ("evolved", "knn-stage")) == (classifier == "rails") or by_scores


def _table() -> tuple[list[tuple[str, str, str, str]], set[tuple[str, str, str, str]]]:
    names = list(classifiers()[0])
    rows = [row for row in product(OPTIMIZERS, OBJECTIVES, names, NORMS) if works(row[1], row[2])]
    # the greedy choice of rows until every pair of parts that can meet has met
    left = {(i, row[i], j, row[j]) for row in rows for i, j in combinations(range(4), 2)}
    chosen = set()
    for row in rows[::7] + rows:
        new = {(i, row[i], j, row[j]) for i, j in combinations(range(4), 2)} & left
        if new:
            chosen.add(row)
            left -= new
    alone = [(name, "", c, norm) for name, c, norm in product(ALONE, names, NORMS) if (name, c) in _alone_pairs(names)]
    named = [(name, "", "dknn", norm) for name, norm in product(NAMED, NORMS) if norm == "l2" or name != "cw-l2"]
    long = {row for row in alone if row[0] == "worst-case-fast" and row[2] not in ("dknn", "joint", *BY_THEMSELVES)}
    long |= {row for row in named if row[3] != "l2" or row[0] == "minimum-norm-thorough"}
    return rows + alone + named, chosen | (set(alone + named) - long)


BY_THEMSELVES = ("network", "rails", "transformed", "smoothed", "mean feature", "function")


def _alone_pairs(names: list[str]) -> set[tuple[str, str]]:
    pairs = set(product(("square", "square on labels", "transferred"), names)) | {("credible", "dknn")}
    pairs |= {("worst-case-fast", n) for n in names}
    return pairs | {(a, n) for a in ("members", "each target") for n in names if n not in BY_THEMSELVES}


_ROWS, _CHOSEN = _table()
TABLE = [
    pytest.param(*row, id=" ".join(filter(None, row)), marks=() if row in _CHOSEN else pytest.mark.slow)
    for row in _ROWS
]


@pytest.mark.parametrize(("optimizer", "objective", "classifier", "norm"), TABLE)
def test_every_combination(optimizer: str, objective: str, classifier: str, norm: str) -> None:
    every, x, y = classifiers()
    victim, attack, threat = every[classifier], make(optimizer, objective), ThreatModel(norm, NORMS[norm])

    def run(threat: ThreatModel, **options: Any) -> AttackResult:
        return attack(victim, x, y, threat, **options)

    result = run(threat)
    assert float(threat.distance(result.x_adv, x).max()) <= NORMS[norm] * (1 + 1e-6)
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1
    plain = victim if optimizer != "credible" else every["rejecting"]
    if optimizer != "credible":
        scores = victim.scores(result.x_adv)
        assert torch.equal(result.success, victim.lead(scores, y) < -TIE)
        assert torch.equal(result.labels, plain.decide(scores))
    for other in (run(threat), run(threat, batch_size=1)):
        for name in COLUMNS:
            assert torch.equal(getattr(result, name), getattr(other, name)), name
    nothing = run(threat.with_eps(0.0))
    assert torch.equal(nothing.x_adv, x)
    aimed = run(threat, targets=(y + 1) % 4)
    if optimizer != "credible":
        reached = victim.lead(victim.scores(aimed.x_adv), y, (y + 1) % 4) < -TIE
        assert torch.equal(aimed.success, reached)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classifier", classifiers()[0])
def test_the_whole_box_breaks_every_classifier(classifier: str, norm: str) -> None:
    """With every input allowed, the short worst case leaves 1 % at most."""
    every = classifiers()[0]
    x = torch.rand(100, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    victim, threat = every[classifier], ThreatModel(norm, 1.0)
    y = every[{"rejecting": "dknn", "smoothed": "knn"}.get(classifier, classifier)].labels(x)
    assert float((victim.labels(x) == y).double().mean()) >= 0.6  # the rest it rejects, or its voters or draws disagree
    result = attacks.create("worst-case-fast")(victim, x, y, threat.with_eps(threat.diameter(x)))
    assert float(result.robust.double().mean()) <= 0.01


def test_a_classifier_is_named_in_words() -> None:
    """In sentences to users, and no address of memory."""
    for name, classifier in classifiers()[0].items():
        assert "object at 0x" not in repr(classifier), name


def test_ask_by_name_takes_layers_and_temperatures() -> None:
    attack = attacks.create("ask", layers="1", temperature=0.2, metric="cosine", steps=3)
    every, x, y = classifiers()
    assert attack.objective == objectives.create("ask", layers=("1",), temperature=0.2, metric="cosine")
    assert attack(every["knn"], x, y, ThreatModel("linf", 0.05)).x_adv.shape == x.shape  # which votes at layer 3


def test_the_table_has_a_row_for_every_part() -> None:
    """A new objective, or a new attack that takes any, is a row here."""
    assert {e.name for e in objectives} == {name.partition(",")[0] for name in OBJECTIVES}
    with_objective = {
        e.name
        for e in attacks
        if isinstance(e.build, type) and "objective" in getattr(e.build, "__dataclass_fields__", {})
    }
    assert with_objective == set(OPTIMIZERS)
    elsewhere = {
        "hop-skip-jump",
        "boundary",
        "published",
        "published-ask-def",
        "worst-case-ask-def-fast",
        "worst-case-ask-def-thorough",
    }  # tests/test_adapters.py, tests/test_published.py, tests/test_suite.py
    assert {e.name for e in attacks} - set(OPTIMIZERS) - set(ALONE) - set(SUITES) - elsewhere == set(NAMED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_cannot_work_says_what_can(optimizer: str, objective: str) -> None:
    class Labels(Classifier):
        n_classes = 4

        def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            return torch.eye(4, dtype=torch.float64)[x.sum(1).long() % 4]

        def fingerprint(self) -> str:
            return "labels"

    with pytest.raises(InputError, match="black-box") as refused:
        make(optimizer, objective)(Labels(), torch.rand(3, 6), [0, 1, 2], ThreatModel())
    assert "square" in str(refused.value)
    assert isinstance(Labels(), Classifier)
    assert not isinstance(Labels(), VoterClassifier)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_a_long_suite_finds_the_same_for_single_samples(suite: str) -> None:
    """The suites that are to be quoted: the batch a sample is in changes nothing, and they end inside the ball."""
    every, x, y = classifiers()
    threat = ThreatModel("linf", NORMS["linf"])
    whole, single = (attacks.create(suite)(every["dknn"], x[:3], y[:3], threat, batch_size=size) for size in (3, 1))
    assert float(threat.distance(whole.x_adv, x[:3]).max()) <= NORMS["linf"] * (1 + 1e-6)
    for name in COLUMNS:
        assert torch.equal(getattr(whole, name), getattr(single, name)), name


@pytest.mark.parametrize(
    ("classifier", "advice"),
    [
        ("network", "pgd-transfer, apgd-margin, adaptive"),
        ("rails", "knn-stage or evolved"),
        ("transformed", "through-transform"),
        ("smoothed", "through-noise"),
        ("mean feature", "through-noise"),
        ("function", "square, hop-skip-jump or boundary"),
    ],
)
def test_an_objective_on_neighbors_names_what_attacks_a_classifier_without_votes(classifier: str, advice: str) -> None:
    every, x, y = classifiers()
    with pytest.raises(InputError, match=advice):
        attacks.create("ask")(every[classifier], x, y, ThreatModel("linf", 0.05))
