"""Feature target, class mean and the 1-NN substitute against their formulas, one input at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sides_by_hand import distance, nearest_of, sphere
from small import random_classifier
from torch import Tensor

from robustknn import DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks import PGD
from robustknn.objectives import ClassMean, FeatureTarget, NearestSubstitute, Objective
from robustknn.objectives.elsewhere import PER_CLASS, candidate_requests, candidates

Array = NDArray[np.float64]
OBJECTIVES = [FeatureTarget(), FeatureTarget(reference=7), ClassMean(), NearestSubstitute()]


class ByHand:
    """A classifier's references and the features of one input, as NumPy arrays."""

    def __init__(self, classifier: DkNN, *inputs: Tensor) -> None:
        references = classifier.references_
        self.classifier, self.metric, self.k = classifier, classifier.metric, classifier.n_neighbors
        self.layers, self.labels = references.layers, references.labels.numpy()
        self.rows = {v: references.rows(v, torch.arange(len(references))).numpy() for v in self.layers}
        self.at: list[dict[str, Array]] = []
        for x in inputs:
            with torch.no_grad():
                self.at.append({k: v[0].numpy() for k, v in references.extractor()(x[None]).items()})

    def wins(self, j: int, y: int, target: int | None) -> bool:
        """Whether reference j, decided by its own k nearest in every layer, is the attacker's, no tie."""
        votes = np.zeros(4)
        for layer in self.layers:
            order = np.argsort([distance(self.rows[layer][j], r, self.metric) for r in self.rows[layer]], kind="stable")
            votes += np.bincount(self.labels[order[: self.k]], minlength=4)
        others = np.delete(votes, y if target is None else target).max()
        return bool(votes[y] < others if target is None else votes[target] > others)

    def target(self, y: int, target: int | None) -> int:
        """The reference that the feature target moves to from the first input: sorting all that are candidates."""
        pool: set[int] = set()
        for layer in self.layers:
            z, rows, near = self.at[0][layer], self.rows[layer], []
            for c in range(4):
                if (c != y) if target is None else (c == target):
                    near += nearest_of(z, rows, self.labels, c, PER_CLASS, self.metric)
            pool |= set(sorted(near, key=lambda j: distance(z, rows[j], self.metric))[:8])
        apart = dict.fromkeys(pool, 0.0)
        for layer in self.layers:
            here = {j: distance(self.at[0][layer], self.rows[layer][j], self.metric) for j in pool}
            mean = np.mean(list(np.abs(list(here.values()))))
            for j in pool:
                apart[j] += here[j] / mean
        return min(pool, key=lambda j: (not self.wins(j, y, target), apart[j]))


def feature_target(config: FeatureTarget, hand: ByHand, y: int, target: int | None) -> float:
    chosen, total = config.reference if config.reference is not None else hand.target(y, target), 0.0
    for layer in hand.layers:
        start, now = (sphere(at[layer], hand.rows[layer][chosen], hand.metric) for at in hand.at)
        total -= now / start
    return total


def class_mean(config: ClassMean, hand: ByHand, y: int, target: int | None) -> float:
    means: dict[str, Array] = {}
    for layer in hand.layers:
        rows = hand.rows[layer]
        if hand.metric == "cosine":
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        means[layer] = np.array([rows[hand.labels == c].mean(0) for c in range(4)])

    def apart(at: dict[str, Array], layer: str) -> Array:
        z = at[layer] / np.linalg.norm(at[layer]) if hand.metric == "cosine" else at[layer]
        return np.asarray(np.linalg.norm(means[layer] - z, axis=1))

    if target is None:
        ranking = np.sum([apart(hand.at[0], v) / apart(hand.at[0], v).mean() for v in hand.layers], 0)
        ranking[y] = np.inf
        target = int(ranking.argmin())
    return float(-sum(apart(hand.at[1], v)[target] / apart(hand.at[0], v)[target] for v in hand.layers))


def substitute(config: NearestSubstitute, hand: ByHand, y: int, target: int | None) -> float:
    n, total = config.n_neighbors or hand.k, 0.0
    if target is None:
        nearest = []
        for v in hand.layers:
            here = np.array([distance(hand.at[0][v], r, hand.metric) for r in hand.rows[v]])
            of_class = np.array([here[hand.labels == c].min() for c in range(4)])
            nearest.append(of_class / of_class.mean())
        ranking = np.sum(nearest, 0)
        ranking[y] = np.inf
        target = int(ranking.argmin())
    for layer in hand.layers:
        z, rows = hand.at[0][layer], hand.rows[layer]
        chosen = {c: nearest_of(z, rows, hand.labels, c, n, hand.metric) for c in range(4)}
        unit = 1.0
        if config.scale == "nearest":
            unit = np.sort([sphere(z, r, hand.metric) ** 2 for r in rows])[hand.k - 1]
        q = {
            c: sum(
                np.exp(-(sphere(hand.at[1][layer], rows[j], hand.metric) ** 2) / unit / config.temperature) for j in ids
            )
            for c, ids in chosen.items()
        }
        total += np.log(q[target] / sum(q.values()))
    return float(total)


FORMS: list[tuple[Objective, Any]] = [
    (FeatureTarget(), feature_target),
    (FeatureTarget(reference=7), feature_target),
    (ClassMean(), class_mean),
    (NearestSubstitute(), substitute),
    (NearestSubstitute(1.0, "none", 3), substitute),
]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("config", "formula"), FORMS, ids=lambda v: str(getattr(v, "__name__", v)))
def test_every_objective_equals_its_formula(config: Objective, formula: Any, metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    bound, x = config.bind(classifier), x0 + 0.05
    for target in (None, (y + 1) % 4):
        got = bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)
        aims = [None] * len(y) if target is None else target.tolist()
        want = [formula(config, ByHand(classifier, x0[i], x[i]), int(y[i]), aims[i]) for i in range(len(x))]
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("config", OBJECTIVES, ids=str)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_gradients_by_finite_differences(config: Objective, metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    bound = config.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, ((x0 + 0.05).requires_grad_(True),))


@pytest.mark.parametrize("config", OBJECTIVES, ids=str)
def test_samples_are_kept_and_looked_up_anew(config: Objective) -> None:
    classifier, x0, y = random_classifier()
    bound, kept = config.bind(classifier), torch.tensor([11, 3, 3])
    target = (y + 2) % 4
    for aim in (None, target):
        batch = bound.start(x0, y, aim, classifier.look(x0, bound.requests))
        before = batch.loss(x0 + 0.02)
        batch.update(kept, None)
        assert torch.equal(batch.loss(x0[kept] + 0.02), before[kept])
        moved = x0[kept] + 0.1
        batch.update(None, classifier.look(moved, bound.requests))
        chosen = None if aim is None else aim[kept]
        again = bound.start(moved, y[kept], chosen, classifier.look(moved, bound.requests))
        assert torch.equal(batch.loss(moved), again.loss(moved))


def test_candidates_are_of_other_classes_by_label_and_then_by_decision() -> None:
    classifier, x, y = random_classifier(layers=("3",))
    voters = classifier.voters
    look = classifier.look(x, candidate_requests(voters))
    labels = classifier.references_.labels
    stored = classifier.references_.rows("3", torch.arange(80))
    scores = classifier.combine([voters[0].votes(voters[0].index.search(stored, 5))])
    decided = classifier.decide(scores)
    found = candidates(classifier, voters, look, y, None)
    known = found.ids >= 0
    assert bool(known.any(1).all())
    assert bool((labels[found.ids] != y[:, None])[known].all())
    for i in range(len(y)):
        for j, lost in zip(found.ids[i].tolist(), found.decided[i].tolist(), strict=True):
            others = torch.cat([scores[j, : y[i]], scores[j, y[i] + 1 :]]).max()
            assert lost == (j >= 0 and float(scores[j, y[i]]) < float(others) - 1e-6)
    first = found.nearest(3)
    assert bool((decided[first[:, 0]] != y)[found.decided.any(1)].all())
    assert first.shape == (12, 3)
    assert found.nearest(50).shape == (12, 50)  # those there are not are −1
    assert bool((found.nearest(50)[:, -1] == -1).all())
    wanted = candidates(classifier, voters, look, y, (y + 1) % 4)
    assert bool((labels[wanted.ids] == (y[:, None] + 1) % 4)[wanted.ids >= 0].all())


def test_the_given_reference_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 4, generator=generator), torch.arange(60) % 3
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(torch.nn.Identity()), (x, y)), 1)
    goal = 7  # of class 1
    start = x[[0, 3, 6]]
    result = PGD(FeatureTarget(goal), steps=200, keep="last", momentum=0.0)(
        classifier, start, y[[0, 3, 6]], ThreatModel("l2", 2.0)
    )
    assert torch.allclose(result.x_adv, x[goal].expand(3, -1), atol=0.02)
    assert result.labels.tolist() == [1, 1, 1]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (FeatureTarget, {"reference": -1}, "at least 0"),
    (FeatureTarget, {"reference": 1.5}, "whole number"),
    (NearestSubstitute, {"temperature": 0.0}, "above 0"),
    (NearestSubstitute, {"scale": "mean"}, "scale must be one of"),
    (NearestSubstitute, {"n_neighbors": 0}, "at least 1"),
    (NearestSubstitute, {"max_classes": 0}, "at least 1"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_a_reference_there_is_not_is_refused() -> None:
    classifier, _, _ = random_classifier()
    with pytest.raises(InputError, match="there is no reference 80; the last of 80 is 79"):
        FeatureTarget(80).bind(classifier)
