"""What an index that is not exact does to a classifier: measured beside its exact twin, and attacked through it.

An attack that is led by the neighbors an approximate index happens to find may fail for want of the right ones, and
the failure looks like robustness. So attacks that look at neighbors are run on the exact twin (the same references,
rule and k, searched exactly), and the classifier as it is deployed decides whether their examples fool it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from robustknn.attacks import Attack, AttackResult, Suite
from robustknn.classifiers import Classifier, Look, VoterClassifier, exact_twin
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError
from robustknn.evaluation.plan import BOTH, DEPLOYED, EXACT, WORST_CASE
from robustknn.neighbors import NeighborIndex
from robustknn.neighbors.faiss_kinds import IVFIndex
from robustknn.neighbors.trained import TrainedIndex


class EngineTold(Protocol):
    """What a summary says of an index."""

    @property
    def index(self) -> str:
        """Its kind."""

    @property
    def settings(self) -> dict[str, Any]:
        """How it was set."""


Columns = dict[str, Any]
EXACTLY = (
    "These attacks searched exactly: their examples were made on the same references with an exact index, and the "
    "classifier as it is deployed decided on them."
)
_FLAGS = ("exact", "updatable", "reconstructs", "distributed", "memory_mb", "path")  # said elsewhere, or no matter
Apply = Callable[[Classifier, Tensor], AttackResult]


@dataclass(frozen=True)
class Pair:
    """A classifier whose index is not exact, and its exact twin."""

    deployed: VoterClassifier
    twin: VoterClassifier

    @classmethod
    def of(cls, classifier: Classifier) -> Pair | None:
        """The classifier beside its twin; None when it searches exactly.

        Raises:
            InputError: no twin can be made of it.
        """
        twin = exact_twin(classifier)
        if twin is classifier:
            return None
        assert isinstance(classifier, VoterClassifier)
        assert isinstance(twin, VoterClassifier)
        return cls(classifier, twin)

    # ------------------------------------------------------------------------------------- attacks

    def seat(self, attack: Attack, x: Tensor) -> str:
        """Where an attack searches: EXACT on the twin, DEPLOYED as the classifier does, or BOTH.

        DEPLOYED is for attacks that do not look at the index, and for those that were told to use it
        (`allow_approximate=True`). BOTH is for the worst case, and for attacks of which some parts can work on the
        twin alone: what stands against the examples made on the twin is attacked once more as it is deployed.

        Args:
            x: one sample (1, …), placed.

        Raises:
            InputError: it cannot work on either.
        """
        if isinstance(attack, Suite):
            attack.check(self.twin, x)
            more = set(attack.usable(self.twin, x)) - set(attack.usable(self.deployed, x))
            return BOTH if more or attack.role == WORST_CASE else DEPLOYED
        try:
            attack.check(self.deployed, x)
        except InputError:
            attack.check(self.twin, x)
            return EXACT
        return DEPLOYED

    def usable(self, attack: Suite, x: Tensor) -> list[str]:
        """The parts of an attack that can work on the classifier, or on its twin where that is attacked too."""
        found = set(attack.usable(self.deployed, x))
        if self.seat(attack, x) == BOTH:
            found |= set(attack.usable(self.twin, x))
        return [name for name in attack.parts if name in found]

    def attacked(self, attack: Attack, seat: str, apply: Apply, n: int) -> tuple[AttackResult, Columns]:
        """The attack's result as the deployed classifier decides, and what the rows say of its twin.

        Args:
            apply: runs the attack on a classifier for some of the n rows, (m,) places.
        """
        every = torch.arange(n)
        if seat == DEPLOYED:
            return apply(self.deployed, every), {}
        on_twin = apply(self.twin, every)
        result = self._judged(attack, on_twin)
        beside = {"twin_robust": on_twin.robust.cpu(), "exact_robust": result.robust.cpu()}
        rows = result.robust.cpu().nonzero()[:, 0]
        if seat == BOTH and len(rows):
            _take(result, apply(self.deployed, rows), rows.to(result.y.device))
        return result, beside

    @torch.no_grad()
    def _judged(self, attack: Attack, result: AttackResult) -> AttackResult:
        """The same examples under the decision of the deployed classifier."""
        judge = attack.judge(self.deployed)
        scores, clean = (self.deployed.look(x).scores for x in (result.x_adv, result.x))
        lead, labels = judge.lead(scores, result.y), self.deployed.decide(scores)
        return replace(
            result, success=lead < -TIE, margin=lead, labels=labels, clean_labels=self.deployed.decide(clean)
        )

    # ------------------------------------------------------------------------------------ measures

    @torch.no_grad()
    def compared(self, x: Tensor, look: Look, measured: Tensor) -> Columns:
        """Columns of clean samples: the recall of every voter, and whether the twin decides alike.

        Recall is the share of the exact k nearest that the index found. Rows that are not measured are NaN.

        Args:
            x: (N, …) inputs, placed.
            look: what the deployed classifier saw of them.
            measured: (N,) bool.
        """
        rows = measured.nonzero()[:, 0].to(x.device)
        missing = torch.full((len(x),), float("nan"), dtype=torch.float64)
        columns = {recall_column(place): missing.clone() for place in range(len(self.deployed.voters))}
        columns["agrees"] = missing.clone()
        if not len(rows):
            return columns
        exact, seen = self.twin.look(x[rows]), look.select(rows)
        for place, (own, true) in enumerate(zip(self.deployed.voters, self.twin.voters, strict=True)):
            found, wanted = (s.nearest[v].first(v.n_neighbors).ids for s, v in ((seen, own), (exact, true)))
            there = (wanted[:, :, None] == found[:, None, :]).any(2)
            columns[recall_column(place)][measured] = there.double().mean(1).cpu()
        alike = self.deployed.decide(seen.scores) == self.twin.decide(exact.scores)
        columns["agrees"][measured] = alike.double().cpu()
        return columns


def settings_of(index: NeighborIndex) -> dict[str, Any]:
    """How an index is set, for the record: what its engine takes, as far as it was given or chosen."""
    told = index.options() if isinstance(index, TrainedIndex) else vars(index)
    plain = {k: v for k, v in told.items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_")}
    probes = {"nprobe": index.probes} if isinstance(index, IVFIndex) else {}
    return {k: v for k, v in plain.items() if k not in _FLAGS} | probes


def engine(told: EngineTold) -> str:
    """An index in a few words: its kind and settings, "IVFIndex (nlist 64, nprobe 8)"."""
    settings = ", ".join(f"{name} {value}" for name, value in told.settings.items())
    return told.index + (f" ({settings})" if settings else "")


def recall_column(place: int) -> str:
    """The column that holds the recall of the voter at this place."""
    return f"recall {place}"


def _take(result: AttackResult, more: AttackResult, rows: Tensor) -> None:
    """Put what a further attack on some rows spent into a result, and its examples where they are worse.

    Args:
        rows: (m,) places of the samples of `more`; they stood in `result`.
    """
    for name in ("gradient_passes", "forward_passes"):
        getattr(result, name)[rows] += getattr(more, name)
    result.zero_gradient[rows] &= more.zero_gradient
    better = more.margin < result.margin[rows]
    kept = {"x", "y", "clean_labels", "trace", "gradient_passes", "forward_passes", "zero_gradient"}
    for name in (f.name for f in fields(AttackResult) if f.name not in kept):
        getattr(result, name)[rows[better]] = getattr(more, name)[better]
