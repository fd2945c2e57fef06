"""What every attack is: a frozen configuration that is called with data, and one kind of result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustknn.batching import MIN_ROWS
from robustknn.checks import as_tensor, check_inputs, check_positive_int, check_whole
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier, check_classifier
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError, brief
from robustknn.threat import SLACK, ThreatModel, check_threat, norm

NOBODY = -1
"""The winner where no part of an attack has succeeded."""


@dataclass
class AttackResult:
    """What an attack found, sample by sample.

    Classes are numbers 0..C − 1: places in `classifier.classes_` where it was fitted on other labels.

    Attributes:
        x_adv: (N, …) the adversarial examples: inside the threat model, the best found by the hard decision.
        x: (N, …) the inputs.
        y: (N,) their true classes.
        success: (N,) bool: on x_adv another class beats the true one strictly (the target beats all others). A
            tie counts for the defender.
        labels: (N,) the classifier's decision on x_adv.
        clean_labels: (N,) its decision on x.
        margin: (N,) the score of the true class minus the best other score on x_adv (for a target: the best other
            score minus the target's); below zero is the attacker's.
        gradient_passes, forward_passes: (N,) backward passes spent on each sample, and looks at the classifier.
        zero_gradient: (N,) bool: the objective had no gradient at the first step.
        winner: (N,) of an attack with parts, the place in `parts` of the one that found x_adv; −1 for none.
        trace: (restart, step, mean loss) of the steps taken, when it was asked for.
    """

    x_adv: Tensor
    x: Tensor
    y: Tensor
    success: Tensor
    labels: Tensor
    clean_labels: Tensor
    margin: Tensor
    gradient_passes: Tensor
    forward_passes: Tensor
    zero_gradient: Tensor
    winner: Tensor
    trace: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def robust(self) -> Tensor:
        """Right without attack and not fooled, (N,) bool; its mean is the robust accuracy."""
        return (self.clean_labels == self.y) & ~self.success

    @property
    def l2(self) -> Tensor:
        """‖x_adv − x‖₂, (N,)."""
        return norm(self.x_adv - self.x, "l2")

    @property
    def linf(self) -> Tensor:
        """max |x_adv − x|, (N,)."""
        return norm(self.x_adv - self.x, "linf")

    @classmethod
    def concatenate(cls, parts: Sequence[AttackResult]) -> AttackResult:
        """One result of consecutive batches."""
        names = [n for n in cls.__dataclass_fields__ if n != "trace"]
        joined = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
        return cls(**joined, trace=[t for p in parts for t in p.trace])


class Attack(ABC):
    """A way to fool a classifier. Implementations are frozen dataclasses with their hyper-parameters.

    Attributes:
        role: which of a report's two columns its accuracy fills: "published" (the protocol of the classifier's own
            paper), "worst-case", or "" for neither.
    """

    role: ClassVar[str] = ""

    def __call__(
        self,
        classifier: Classifier,
        x: Any,
        y: Any,
        threat: ThreatModel,
        *,
        targets: Any = None,
        sample_ids: Any = None,
        seed: int = 0,
        batch_size: int = 128,
        trace: bool = False,
    ) -> AttackResult:
        """Attack a classifier.

        Args:
            classifier: what to fool.
            x: (N, …) inputs inside the threat model's bounds.
            y: (N,) true labels, as in `classifier.score`: class numbers, or the labels that `fit` saw.
            threat: norm, eps and bounds.
            targets: (N,) the class each input should be taken for, written as in y, or None for any wrong class.
            sample_ids: (N,) what the random numbers of each sample are counted from; 0..N−1 by default. With the
                same seed and ids a sample gets the same result in any batch and order.
            seed: of all randomness.
            batch_size: samples worked on at once; it changes memory and time, not results.
            trace: keep the mean loss of every step.

        Raises:
            InputError: bad inputs, labels or targets, or an attack that cannot work on this classifier.
        """
        check_classifier(classifier)
        check_threat(threat)
        check_whole(seed, "seed")
        x = check_inputs(classifier.place(x), threat.bounds)
        threat.radii(x)  # refuses another number of radii than samples
        check_several_classes(classifier)
        y = classifier.numbers(y, len(x)).to(x.device)
        if targets is not None:
            targets = classifier.numbers(targets, len(x), "targets").to(x.device)
            if bool((targets == y).any()):
                raise InputError("a target equals the true label; choose another class for it.")
        ids = _check_ids(sample_ids, len(x)).to(x.device)
        check_positive_int(batch_size, "batch_size")
        self.check(classifier, x[:1])
        return self.apply(classifier, x, y, threat, targets, ids, seed, batch_size, trace)

    def apply(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        targets: Tensor | None,
        ids: Tensor,
        seed: int,
        batch_size: int,
        trace: bool = False,
    ) -> AttackResult:
        """The attack, on what was checked: x placed, y and targets class numbers, all on x's device."""
        parts = []
        for batch in torch.arange(len(x), device=x.device).split(batch_size):
            rows = padded_rows(batch)
            target = None if targets is None else targets[rows]
            job = Job(classifier, x[rows], y[rows], target, ids[rows], threat.select(rows), seed, trace)
            self.run(job)
            parts.append(job.result(len(batch)))
        return AttackResult.concatenate(parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the attacks this one consists of, none for most."""
        return ()

    @property
    def transfer(self) -> bool:
        """Whether it looks at the network alone and not at the neighbors."""
        objective = getattr(self, "objective", None)
        return bool(getattr(objective, "transfer", False))

    def check(self, classifier: Classifier, x: Tensor) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse a classifier that this attack cannot work on; called before anything runs, or is written.

        Args:
            x: one sample (1, …), placed: for what only a forward pass shows, such as a network without gradient.

        Raises:
            InputError: the sentence says which attack or objective to use instead.
        """

    def judge(self, classifier: Classifier) -> Classifier:
        """Who says what counts as success: the classifier itself for most."""
        return classifier

    @abstractmethod
    def run(self, job: Job) -> None:
        """Work on one batch, reporting every candidate through `job.offer` or `job.settle`."""


def check_attack(value: object) -> None:
    """InputError for what is no attack."""
    if not isinstance(value, Attack):
        raise InputError(f"attack must be an Attack such as PGD(), not {brief(value)}.")


def check_several_classes(classifier: Classifier) -> None:
    """InputError for a classifier of one class, which no attack can fool."""
    if classifier.n_classes < 2:
        raise InputError("the classifier has one class, so nothing can be taken for another; add references of others.")


def _check_ids(sample_ids: Any, n: int) -> Tensor:
    """What random numbers are counted from, (n,) whole numbers: 0..n − 1 when nothing was given."""
    if sample_ids is None:
        return torch.arange(n)
    ids = as_tensor(sample_ids, "sample_ids")
    if ids.shape != (n,):
        found = len(ids) if ids.ndim == 1 else f"shape {tuple(ids.shape)}, not"
        raise InputError(f"sample_ids has {found} entries for {n} samples; pass one each.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"sample_ids has dtype {str(ids.dtype).removeprefix('torch.')}; pass whole numbers.")
    return ids


def padded_rows(rows: Tensor) -> Tensor:
    """Places repeated up to the least batch a CPU kernel treats alike (see `robustknn.batching.MIN_ROWS`)."""
    missing = MIN_ROWS - len(rows) if rows.device.type == "cpu" else 0
    return rows if missing <= 0 or not len(rows) else torch.cat([rows, rows[:1].expand(missing)])


class Job:
    """One batch under attack: the inputs, and the best example of each sample so far by the hard decision."""

    def __init__(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        ids: Tensor,
        threat: ThreatModel,
        seed: int,
        trace: bool,
    ) -> None:
        self.classifier, self.x, self.y, self.target = classifier, x, y, target
        self.ids, self.threat, self.seed = ids, threat, seed
        self.aim = target  # what the objective is told; any wrong class may count while it aims at one
        self.trace: list[tuple[int, int, float]] | None = [] if trace else None
        self.best = x.clone()
        self.margin = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
        self.labels = y.clone()
        self.clean_labels = y.clone()
        self.gradient_passes = torch.zeros_like(y)
        self.forward_passes = torch.zeros_like(y)
        self.zero_gradient = torch.zeros_like(y, dtype=torch.bool)
        self.winner = torch.full_like(y, NOBODY)

    def begin(self, scores: Tensor) -> None:
        """Take the decision on the clean inputs: what is wrong already needs no attack."""
        self.clean_labels = self.classifier.decide(scores)
        self.offer(self.x, torch.arange(len(self.x), device=self.x.device), scores)

    def part(self, rows: Tensor, seed: int) -> Job:
        """A job of its own on some rows, for an attack that is a part of this one."""
        target = None if self.target is None else self.target[rows]
        threat, trace = self.threat.select(rows), self.trace is not None
        made = Job(self.classifier, self.x[rows], self.y[rows], target, self.ids[rows], threat, seed, trace)
        made.aim = None if self.aim is None else self.aim[rows]
        return made

    def take(self, part: Job, rows: Tensor, place: int = NOBODY) -> None:
        """Take over what a part found and spent on these rows; `place` is recorded where it succeeded best."""
        better = part.margin < self.margin[rows]
        chosen = rows[better]
        self.best[chosen] = part.best[better]
        self.margin[chosen] = part.margin[better]
        self.labels[chosen] = part.labels[better]
        self.winner[rows[better & (part.margin < -TIE)]] = place
        self.gradient_passes[rows] += part.gradient_passes
        self.forward_passes[rows] += part.forward_passes
        if self.trace is not None:
            self.trace += part.trace or []

    def standing(self) -> Tensor:
        """The rows that have not been fooled yet, of a randomized classifier not by a wide lead."""
        return (self.margin >= -self.classifier.enough).nonzero()[:, 0]

    def look(self, x_adv: Tensor, rows: Tensor, requests: Sequence[Request] = ()) -> tuple[Tensor, Look | None]:
        """The hard scores of some rows, and the look they came from (None for a classifier without voters)."""
        self.forward_passes[rows] += 1
        if isinstance(self.classifier, VoterClassifier):
            look = self.classifier.look(x_adv, requests)
            return look.scores, look
        return self.classifier.scores(x_adv, self.ids[rows]), None

    def lead(self, scores: Tensor, rows: Tensor) -> Tensor:
        """By how much the defender leads, (n,): negative beyond a tie is the attacker's success."""
        target = None if self.target is None else self.target[rows]
        return self.classifier.lead(scores, self.y[rows], target)

    def offer(self, x_adv: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
        """Take x_adv as the best of its rows where it is better than what is held; returns who needs no more.

        x_adv must lie inside the threat model.
        """
        lead = self.lead(scores, rows)
        self._hold(x_adv, rows, scores, lead, lead < self.margin[rows])
        return self.margin[rows] < -self.classifier.enough

    def offer_nearest(self, x_adv: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
        """As `offer`, but of the examples that succeed the one nearest to its input is kept, by the threat's norm.

        Returns who succeeds with x_adv itself, inside the threat model or not: one outside it is not held.
        """
        lead = self.lead(scores, rows)
        threat, x = self.threat.select(rows), self.x[rows]
        distance = threat.distance(x_adv.double(), x.double())
        radius = threat.radii(x.double()).reshape(-1).expand(len(rows))
        inside = distance <= radius * (1 + SLACK)
        wins, held = lead < -TIE, self.margin[rows] < -TIE
        nearer = distance < threat.distance(self.best[rows].double(), x.double())
        better = inside & torch.where(wins, ~held | nearer, ~held & (lead < self.margin[rows]))
        self._hold(x_adv, rows, scores, lead, better)
        return wins

    def _hold(self, x_adv: Tensor, rows: Tensor, scores: Tensor, lead: Tensor, better: Tensor) -> None:
        chosen = rows[better]
        self.best[chosen] = x_adv[better].detach()
        self.margin[chosen] = lead[better]
        self.labels[chosen] = self.classifier.decide(scores)[better]

    def settle(self, x_adv: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Hold x_adv for its rows, better or not (attacks that return their last iterate)."""
        self.best[rows] = x_adv.detach()
        self.margin[rows] = self.lead(scores, rows)
        self.labels[rows] = self.classifier.decide(scores)

    def result(self, n: int) -> AttackResult:
        """The outcome of the first n rows (the others are padding)."""
        return AttackResult(
            x_adv=self.best[:n],
            x=self.x[:n],
            y=self.y[:n],
            success=self.margin[:n] < -TIE,
            labels=self.labels[:n],
            clean_labels=self.clean_labels[:n],
            margin=self.margin[:n],
            gradient_passes=self.gradient_passes[:n],
            forward_passes=self.forward_passes[:n],
            zero_gradient=self.zero_gradient[:n],
            winner=self.winner[:n],
            trace=self.trace or [],
        )
