"""Several classifiers over one network, to be fooled by one perturbation (AdvKNN, arXiv 1911.06591, eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.classifiers.base import VoterClassifier, check_classifier
from robustknn.classifiers.rules import Rule, Votes, margin
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor


@dataclass(frozen=True)
class WidestMargin(Rule):
    """The score of class c is the widest margin max_i (s_i(c) − max_{c' ≠ c} s_i(c')) by which any member holds it.

    It is below zero where no member decides for c.

    Args:
        rules: the members' rules.
        counts: how many of the votes belong to each.
    """

    rules: tuple[Rule, ...]
    counts: tuple[int, ...]

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        held, first = [], 0
        for rule, count in zip(self.rules, self.counts, strict=True):
            scores = rule(votes[first : first + count], n_classes)
            classes = torch.arange(n_classes, device=scores.device)
            held.append(torch.stack([margin(scores, c.expand(len(scores))) for c in classes], 1))
            first += count
        return torch.stack(held).amax(0)


@registry.classifiers.register("joint")
class Joint(VoterClassifier):
    """Fooled when all its members are: they decide for other classes than the true one (for a target: for it).

    Its decision is the class that a member holds by the widest margin, so members that disagree count as right only
    where the right one is the surer.

    Args:
        members: the classifiers by name, over one reference set.

    Raises:
        InputError: fewer than two, or of several reference sets.
    """

    def __init__(self, members: Mapping[str, VoterClassifier]) -> None:
        if not isinstance(members, Mapping) or len(members) < 2:
            raise InputError("a joint attack needs two classifiers or more, by name: {'knn': …, 'dknn': …}.")
        for name, member in members.items():
            check_classifier(member, f"classifier {name!r}")
            if not isinstance(member, VoterClassifier):
                raise InputError(
                    f"classifier {name!r} does not consist of voters; a joint attack needs their references."
                )
            if decides_otherwise(member):
                raise InputError(
                    f"classifier {name!r} does not decide by its votes alone (it rejects, or is joint itself), which a "
                    "joint vote cannot tell; pass the classifiers inside it."
                )
        if len({id(v.references) for m in members.values() for v in m.voters}) > 1:
            raise InputError(
                "the classifiers of a joint attack must stand on one reference set; build them over one, and leave out "
                "retrieval and DAEkNN, which have references of their own."
            )
        self.members = dict(members)

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        return next(iter(self.members.values())).n_classes

    @property
    def classes_(self) -> Any:
        """The labels of the first member, by class number."""
        return getattr(next(iter(self.members.values())), "classes_", None)

    @property
    def voters(self) -> tuple[Voter, ...]:
        return tuple(v for m in self.members.values() for v in m.voters)

    @property
    def rule(self) -> Rule:
        every = self.members.values()
        return WidestMargin(tuple(m.rule for m in every), tuple(len(m.voters) for m in every))

    @property
    def extractor(self) -> FeatureExtractor | None:
        layers = list(dict.fromkeys(v.layer for v in self.voters))
        own = next(iter(self.members.values())).extractor
        if own is None or set(layers) <= set(own.layers):
            return own
        return self.voters[0].references.extractor().select(layers)

    def lead(self, scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            return scores.gather(1, y[:, None])[:, 0]
        # All members hold the target exactly where none holds another class.
        others = scores.scatter(1, target[:, None], float("-inf"))
        return others.amax(1)

    def fingerprint(self) -> str:
        return store.fingerprint_config({"joint": {name: m.fingerprint() for name, m in self.members.items()}})

    def __repr__(self) -> str:
        return f"Joint({', '.join(self.members)})"


def decides_otherwise(member: VoterClassifier) -> bool:
    """Whether a classifier has a decision of its own beside its rule."""
    own, plain = type(member), VoterClassifier
    return any(getattr(own, name) is not getattr(plain, name) for name in ("decide", "lead", "combine"))
