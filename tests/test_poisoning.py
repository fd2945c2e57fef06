"""Poisoning certificates against every way to poison small cases, and against poisoned classifiers themselves.

The brute force below knows nothing of the rules: it lists all removals, labels and places, and counts votes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
import torch
from small import random_classifier, random_net

from robustknn import KNN, DkNN, FaissIndex, FeatureExtractor, InputError, ReferenceSet, Rejecting, RetrievalClassifier
from robustknn.certification import PoisoningInsert, PoisoningModify
from robustknn.certification.vote_gap import modified
from robustknn.classifiers import DAEkNN, Joint, Network, Rule, VoterClassifier, VoteShare
from robustknn.classifiers.retrieval import confidence

Array = np.ndarray[Any, Any]
E = 3
"""Changes tried: with k ≤ 5 votes of one layer no decision survives three."""
BOTH = [PoisoningModify(), PoisoningInsert()]


# ----------------------------------------------------------------------------------- every way to poison a ranking


@cache
def poisonings(n: int, k: int, e: int, classes: int, insert: bool) -> Array:
    """All rankings (M, k) that e changes make of n: places 0..n − 1 of what was there, −1 − c for an inserted c."""
    found = set()
    for count in {0, e}:  # e changes, and none: fewer are met at a smaller e
        for gone in [()] if insert else combinations(range(n), count):
            left = [i for i in range(n) if i not in gone]
            marks = list(product(range(classes), range(len(left) + 1)))
            for added in combinations_with_replacement(marks, count):
                ranking = []
                for place in range(len(left) + 1):
                    ranking += [-1 - c for c, p in added if p == place]
                    ranking += left[place : place + 1]
                found.add(tuple(ranking[:k]))
    return np.array(sorted(found))


def leads_everywhere(rankings: Array, labels: Array, y: int, classes: int) -> bool:
    """Whether y has strictly the most votes in every ranking (M, k) of references with these labels."""
    voted = np.where(rankings >= 0, labels[rankings.clip(0)], -1 - rankings)
    counts = np.stack([(voted == c).sum(1) for c in range(classes)], 1)
    others = np.delete(counts, y, 1).max(1)
    return bool((counts[:, y] > others).all())


def true_radius(labels: Array, k: int, classes: int, insert: bool) -> int:
    counts = np.bincount(labels[:k], minlength=classes)
    y, radius = int(counts.argmax()), -1
    for e in range(E + 1):
        if not leads_everywhere(poisonings(len(labels), k, e, classes, insert), labels, y, classes):
            break
        radius = e
    return radius


def on_a_line(labels: Array, k: int) -> KNN:
    """References at 1, 2, 3, … of a query at 0."""
    references = np.arange(1.0, len(labels) + 1)[:, None]
    return KNN(n_neighbors=k).fit(references, labels)


def cases(count: int) -> Iterator[tuple[Array, int, int]]:
    """Labels in order of distance, k, the number of classes; every class is there."""
    random = np.random.default_rng(0)
    made = 0
    while made < count:
        k, classes = int(random.integers(1, 6)), int(random.integers(2, 4))
        n = int(random.integers(k, 7))
        labels = random.choice(classes, n, p=random.dirichlet(np.ones(classes)))
        if len(set(labels.tolist())) == classes:
            made += 1
            yield labels, k, classes


@pytest.mark.parametrize("certifier", BOTH, ids=lambda c: c.name)
def test_the_rules_are_exact_on_a_thousand_small_cases(certifier: PoisoningModify) -> None:
    query, seen = torch.zeros(1, 1, dtype=torch.float64), set()
    for labels, k, classes in cases(1000):
        certified = certifier(on_a_line(labels, k), query)
        expected = true_radius(labels, k, classes, certifier.insert)
        assert certified.radius.tolist() == [expected], (labels, k)
        assert certified.upper is not None
        assert certified.upper.tolist() == [expected + 1]
        seen.add(expected)
    assert seen == {-1, 0, 1, 2}


# -------------------------------------------------------------------------------------- several layers, one reference


def deep_rankings(orders: list[list[int]], k: int, e: int, classes: int, insert: bool) -> Array:
    """Ids (or −1 − c) in all layers after e changes: a reference goes from all, an inserted one has a place in each."""
    n, found = len(orders[0]), set()
    for gone in [()] if insert else combinations(range(n), e):
        lefts = [[i for i in order if i not in gone] for order in orders]
        marks = list(product(range(classes), *[range(len(left) + 1) for left in lefts]))
        for added in combinations_with_replacement(marks, e):
            ranking: list[int] = []
            for layer, left in enumerate(lefts):
                whole = []
                for place in range(len(left) + 1):
                    whole += [-1 - m[0] for m in added if m[1 + layer] == place]
                    whole += left[place : place + 1]
                ranking += whole[:k]
            found.add(tuple(ranking))
    return np.array(sorted(found))


class Line(torch.nn.Module):
    """Two layers: the first and the second coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x[:, :1]) + self.second(x[:, 1:])


def deep_case(n: int, k: int, classes: int, changes: int, insert: bool, count: int) -> Iterator[tuple[int, int, int]]:
    """(true radius up to `changes`, certified radius, (lead − 1) / 4) of DkNNs on two layers, rounded down."""
    random, features = np.random.default_rng(1), FeatureExtractor(Line(), ["first", "second"])
    certifier = PoisoningInsert() if insert else PoisoningModify()
    for _ in range(4):
        orders = [random.permutation(n).tolist() for _ in range(2)]
        places = torch.tensor(np.argsort(orders, axis=1).T + 1, dtype=torch.float64)
        vectors = {"first": places[:, :1], "second": places[:, 1:]}
        every = [deep_rankings(orders, k, e, classes, insert) for e in range(changes + 1)]
        for _ in range(count):
            held = random.permutation(
                [*range(classes), *random.choice(classes, n - classes, p=random.dirichlet([0.5] * classes))]
            )
            votes = np.bincount(held[[order[:k] for order in orders]].flatten(), minlength=classes)
            y = int(votes.argmax())
            safe = [leads_everywhere(rankings, held, y, classes) for rankings in every]
            dknn = DkNN(ReferenceSet.from_vectors(vectors, held, features=features), k)
            found = int(certifier(dknn, torch.zeros(1, 2, dtype=torch.float64)).radius)
            gap = int(votes[y] - np.delete(votes, y).max())
            yield (
                (safe.index(False) if False in safe else changes + 1) - 1,
                min(found, changes),
                min((gap - 1) // 4, changes),
            )


@pytest.mark.parametrize(("n", "k", "classes", "changes"), [(5, 3, 2, 2), (8, 4, 4, 1)])
def test_in_several_layers_insertion_is_exact(n: int, k: int, classes: int, changes: int) -> None:
    found = list(deep_case(n, k, classes, changes, True, 40))
    assert all(true == certified for true, certified, _ in found)
    assert any(certified > gap for _, certified, gap in found)


def test_in_several_layers_modification_is_sound_and_here_exact() -> None:
    found = list(deep_case(5, 3, 2, 2, False, 40)) + list(deep_case(8, 4, 4, 1, False, 40))
    assert all(true >= certified == gap for true, certified, gap in found)
    assert all(true == certified for true, certified, _ in found)


def test_in_several_layers_modification_is_not_always_exact_and_says_so() -> None:
    """No reference takes a vote of class 0 from both layers, so one modification leaves it its lead of 4, less 3."""
    held, k, orders = np.array([0, 0, 0, 1, 0, 0, 2, 3]), 4, [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3]]
    assert leads_everywhere(deep_rankings(orders, k, 1, 4, False), held, 0, 4)
    places = torch.tensor(np.argsort(orders, axis=1).T + 1, dtype=torch.float64)
    vectors = {"first": places[:, :1], "second": places[:, 1:]}
    dknn = DkNN(ReferenceSet.from_vectors(vectors, held, features=FeatureExtractor(Line(), ["first", "second"])), k)
    certified = PoisoningModify()(dknn, torch.zeros(1, 2, dtype=torch.float64))
    assert certified.radius.tolist() == [0]
    assert certified.upper is None
    assert any("not always tight" in said for said in certified.assumptions)


def worst_lead(orders: list[list[int]], labels: Array, k: int, e: int, y: int, classes: int) -> int:
    """The least lead of y over all removals of e references, with e votes for one class put first in every layer."""
    leads = []
    for gone in combinations(range(len(labels)), e):
        left = [[i for i in order if i not in gone][: k - e] for order in orders]
        counts = np.bincount(labels[[i for kept in left for i in kept]], minlength=classes)
        leads += [counts[y] - counts[b] - e * len(orders) for b in range(classes) if b != y]
    return int(min(leads))


def test_more_layers_and_classes_than_can_be_listed_whole() -> None:
    """Insertion first in every layer is the worst (above); so removals alone are searched."""
    random, tight = np.random.default_rng(4), []
    for _ in range(300):
        layers, k, classes, n = (int(random.integers(a, b)) for a, b in ((2, 4), (3, 6), (4, 9), (10, 14)))
        labels = random.choice(classes, n, p=random.dirichlet([4, *[0.7] * (classes - 1)]))
        orders = [random.permutation(n).tolist() for _ in range(layers)]
        near = torch.from_numpy(labels)[torch.tensor([order[:k] for order in orders]).T[None]]
        y = int(np.bincount(near.flatten().numpy()).argmax())
        found, expected = int(modified(near, torch.tensor([y]))), -1
        while worst_lead(orders, labels, k, expected + 1, y, classes) > 0:
            expected += 1
        assert found <= expected
        tight.append(found == expected)
    assert np.mean(tight) > 0.95


# -------------------------------------------------------------------------------------- classifiers that are poisoned


@dataclass
class Poisoner:
    """Random and aimed changes of up to e rows of reference sets, the same rows in every set and layer."""

    insert: bool
    random: np.random.Generator

    def __call__(self, sets: list[ReferenceSet], e: int, query: dict[str, torch.Tensor], b: int) -> list[ReferenceSet]:
        n, aimed = len(sets[0]), self.random.random() < 0.7
        if self.insert:
            rows = np.arange(n, n + e)
        else:
            layer = self.random.choice(list(query))
            near = (sets[0].vectors(layer)[0] - query[layer]).norm(dim=1).argsort()[: 3 * e].numpy()
            rows = self.random.choice(near if aimed else n, e, replace=False)
        return [self._set(held, rows, query, b, aimed) for held in sets]

    def _set(
        self, held: ReferenceSet, rows: Array, query: dict[str, torch.Tensor], b: int, aimed: bool
    ) -> ReferenceSet:
        labels, vectors = held.labels.clone(), {layer: held.vectors(layer)[0].clone() for layer in held.layers}
        payload = None if held.stored_payload is None else held.stored_payload.clone()
        if self.insert:
            labels = torch.cat([labels, labels[: len(rows)]])
            vectors = {layer: torch.cat([v, v[: len(rows)]]) for layer, v in vectors.items()}
            payload = None if payload is None else torch.cat([payload, payload[: len(rows)]])
        for row in rows:
            labels[row] = b if aimed else int(self.random.integers(held.n_classes))
            for layer in query:
                v = vectors[layer]
                far = self.random.choice([0, 0, 1e-6, 0.1, 1, 100])
                v[row] = query[layer][0] + far * torch.from_numpy(self.random.normal(size=v.shape[1]))
            if payload is not None:
                spread = torch.from_numpy(self.random.dirichlet(np.full(held.n_classes, 0.2)))
                payload[row] = torch.eye(held.n_classes)[labels[row]] if aimed else spread
        return ReferenceSet.from_vectors(
            vectors, labels, features=held.features, n_classes=held.n_classes, payload=payload
        )


def deep_sets(seed: int, payload: bool = False) -> tuple[list[ReferenceSet], torch.Tensor]:
    """Two reference sets over two layers of a random network, and 12 inputs."""
    dknn, x, _ = random_classifier(seed=seed)
    held = dknn.references_
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for shift in (0, 0.02):
        vectors = {layer: held.vectors(layer)[0] + shift for layer in held.layers}
        first = next(iter(vectors.values()))
        labels = (first[:, 0] > first[:, 0].median()).long() + 2 * (first[:, 1] > first[:, 1].median()).long()
        spread = torch.rand(len(labels), 4, generator=generator, dtype=torch.float64) + 20 * torch.eye(4)[labels]
        kept = spread / spread.sum(1, keepdim=True) if payload else None
        sets.append(ReferenceSet.from_vectors(vectors, labels, features=held.features, n_classes=4, payload=kept))
    return sets, x


def made(kind: str, sets: list[ReferenceSet]) -> VoterClassifier:
    """A classifier of a kind over (the first of) these sets."""
    name, _, option = kind.partition(" ")
    layer = sets[0].layers[-1]
    if name == "knn":
        return KNN(sets[0], 9, layer=layer, metric=option)
    if name == "dknn":
        return DkNN(sets[0], 7, metric=option)
    if name == "retrieval":
        return RetrievalClassifier(sets[0], 9, layer=layer, weighting=option)
    weighting, _, scale = option.partition(" ")
    return DAEkNN(sets[0], sets[1], 9, weighting=weighting, scale=scale if scale == "mean" else float(scale or 1))


KINDS = [
    *("knn l2", "knn cosine", "knn ip", "dknn l2", "dknn cosine"),
    *("retrieval UW", "retrieval CBW-E", "retrieval CBW-D"),
    *("daeknn paper", "daeknn paper mean", "daeknn released 0.1", "daeknn uniform", "daeknn paper 0.05"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("certifier", BOTH, ids=lambda c: c.name)
def test_no_poisoning_inside_the_radius_changes_a_decision(certifier: PoisoningModify, kind: str) -> None:
    random, held, broken = np.random.default_rng(2), 0, 0
    for seed in range(2):
        sets, x = deep_sets(seed, payload=kind.startswith("retrieval"))
        victim = made(kind, sets)
        certified = certifier(victim, x)
        assert torch.equal(certified.labels, victim.labels(x))
        with torch.no_grad():
            features = victim.read(x, [v.layer for v in victim.voters])
        for row in range(len(x)):
            radius, y = int(certified.radius[row]), int(certified.labels[row])
            query = {layer: f[row : row + 1] for layer, f in features.items()}
            for _ in range(8):
                b = int((y + random.integers(1, 4)) % 4)
                for e in {radius, radius + 1}:
                    if e < 1:
                        continue
                    poisoned = made(kind, Poisoner(certifier.insert, random)(sets, e, query, b))
                    lead = float(poisoned.lead(poisoned.scores(x[row : row + 1]), torch.tensor([y])))
                    if e == radius:
                        assert lead > 1e-6, (kind, row, e)
                        held += 1
                    broken += lead <= 1e-6
    assert held > 50
    assert broken > 0  # the attacks can do something


# ------------------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("weighting", ["uniform", "entropy", "gap"])
@pytest.mark.parametrize("certifier", BOTH, ids=lambda c: c.name)
def test_the_retrieval_rule_is_exact(certifier: PoisoningModify, weighting: str) -> None:
    """Every removal, and certain vectors of every class in every place; leads are sums over what is left."""
    random, classes, query = np.random.default_rng(3), 3, torch.zeros(1, 1, dtype=torch.float64)
    radii = []
    for _ in range(60):
        k = int(random.integers(1, 6))
        n = int(random.integers(k, 7))
        s = np.exp(random.normal(size=(n, classes)) * 2 + [2, 0, 0])
        s /= s.sum(1, keepdims=True)
        both = np.concatenate([s, np.eye(classes)[::-1]])  # an inserted class c is −1 − c in a ranking
        sure = confidence(torch.from_numpy(both), weighting).numpy()
        y = int((sure[:k] @ both[:k]).argmax())
        radius = -1
        for e in range(k + 1):
            rankings = poisonings(n, k, e, classes, certifier.insert)
            total = (sure[rankings][:, :, None] * both[rankings]).sum(1) / sure[rankings].sum(1, keepdims=True)
            if not (total[:, y] > np.delete(total, y, 1).max(1) + 3e-6).all() or e > E:
                break
            radius = e
        references = ReferenceSet.from_vectors(
            torch.arange(1.0, n + 1, dtype=torch.float64)[:, None],
            payload=torch.from_numpy(s),
            features=FeatureExtractor(torch.nn.Identity()),
        )
        certified = certifier(RetrievalClassifier(references, k, weighting=weighting), query)
        assert certified.radius.tolist() == [radius]
        radii.append(radius)
    assert {0, 1} <= set(radii)


# ---------------------------------------------------------------------------------------------------------- the face


def test_what_is_said_and_a_batch_changes_nothing() -> None:
    dknn, x, _ = random_classifier(k=9)
    for certifier, small in (
        (PoisoningModify(), PoisoningModify(batch_size=5)),
        (PoisoningInsert(), PoisoningInsert(3)),
    ):
        whole, parts = certifier(dknn, x), small(dknn, x)
        assert torch.equal(whole.radius, parts.radius)
        assert torch.equal(whole.labels, parts.labels)
        assert whole.unit == certifier.unit
        assert (
            whole.assumptions[0]
            == "The network and the way its features are made are fixed and trusted; only references change."
        )
        assert whole.radius.dtype == torch.float64


def test_certified_accuracy_counts_ties_and_wrong_decisions_as_failures() -> None:
    references = torch.arange(1.0, 7)[:, None]
    knn = KNN(n_neighbors=4).fit(references, torch.tensor([0, 0, 0, 0, 1, 1]))
    certified = PoisoningModify()(knn, torch.tensor([[0.0], [3.4], [9.0]]))
    assert certified.radius.tolist() == [1, 0, -1]  # 4 votes against 0, 3 against 1, 2 against 2
    assert certified.accuracy([0, 0, 0], [-1, 0, 1, 2]).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert certified.accuracy([0, 1, 0], 0).tolist() == pytest.approx([1 / 3])


class Other(Rule):
    """A rule of a user's own."""

    def __call__(self, votes: Any, n_classes: int) -> torch.Tensor:
        return VoteShare()(votes, n_classes)


class OwnRule(KNN):
    """A classifier with it."""

    @property
    def rule(self) -> Rule:
        return Other()


def test_where_it_does_not_hold_it_is_refused() -> None:
    dknn, x, y = random_classifier()
    held = dknn.references_
    knn = KNN(held, 5, layer="3")
    network = Network(random_net(), 4)
    calibrated = dknn.calibrate(x, y)
    weighted = DAEkNN(held, held, 5, metric="ip")
    for classifier, why in (
        (network, "shows no voting references"),
        (Joint({"a": knn, "b": dknn}), "does not decide by its votes alone"),
        (Rejecting(calibrated, 0.1), "does not decide by its votes alone"),
        (OwnRule(held, 5, layer="3"), "its rule Other"),
        (weighted, "inner products know no nearest place"),
    ):
        for certifier in BOTH:
            with pytest.raises(InputError, match=why):
                certifier(classifier, x)
    assert PoisoningInsert()(DAEkNN(held, held, 5, metric="ip", weighting="uniform"), x).radius.shape == (12,)
    with pytest.raises(InputError, match="batch_size"):
        PoisoningModify(batch_size=0)


def test_an_approximate_index_is_refused() -> None:
    faiss = pytest.importorskip("faiss")
    dknn, x, _ = random_classifier()
    vectors = dknn.references_.vectors("3")[0].float().numpy()
    index = faiss.IndexHNSWFlat(vectors.shape[1], 8)
    index.add(vectors)
    knn = KNN(dknn.references_, 5, layer="3", index=FaissIndex.wrap(index, metric="l2"))
    with pytest.raises(InputError, match="its index is approximate"):
        PoisoningModify()(knn, x)
