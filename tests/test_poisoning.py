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
from robustknn.classifiers import DAEkNN, Joint, Network, Rule, VoterClassifier, VoteShare
from robustknn.classifiers.retrieval import confidence

Array = np.ndarray[Any, Any]
E = 3
"""Changes tried: with k ≤ 5 votes of one layer no decision survives three."""
BOTH = [PoisoningModify(), PoisoningInsert()]


# ----------------------------------------------------------------------------------- every way to poison a ranking


@cache
def poisonings(n: int, k: int, e: int, classes: int, insert: bool) -> Array:
    """All rankings of k that e changes make of n: places 0..n − 1 of what was there, −1 − c for an inserted c, (M, k)."""
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
    """(true radius up to `changes`, certified radius, what the gap of votes alone gives) of DkNNs on two layers."""
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


def test_in_several_layers_modification_is_sound_and_mostly_exact() -> None:
    found = list(deep_case(5, 3, 2, 2, False, 40)) + list(deep_case(8, 4, 4, 1, False, 100))
    assert all(true >= certified >= gap for true, certified, gap in found)
    # The votes that stand last, or in one layer alone, cannot all be lost: the gap alone does not see it.
    assert any(certified > gap for _, certified, gap in found)
    assert np.mean([true == certified for true, certified, _ in found]) > 0.9
