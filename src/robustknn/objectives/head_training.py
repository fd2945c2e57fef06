"""Training DkNNB's heads: the votes of references among each other, and a linear map that learns them."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.classifiers.base import VoterClassifier
from robustknn.classifiers.rules import count_votes, decide
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.neighbors import Neighbors
from robustknn.objectives.dknnb import DkNNB, Head, HeadTraining, head_loss, head_voters, votes_of
from robustknn.objectives.guides import prepared
from robustknn.progress import Progress, Silent

_SEARCHED = 256  # references whose neighbors are searched at a time
_BYTES = 1 << 26  # of features held at a time while a head is trained
_ROUND, _PATIENCE = 5, 4  # steps between looks at the held-out references, and looks without gain before the end
_HELD_OUT, _FEWEST = 10, 40  # one reference of ten is held out, of so many or more
_KEPT_HEADS, _KEPT_VOTES = 64, 4

_HEADS: OrderedDict[tuple[str, HeadTraining], Head] = OrderedDict()
_VOTES: OrderedDict[tuple[str, int | None, int], tuple[Tensor, Tensor]] = OrderedDict()


def train_heads(
    classifier: VoterClassifier,
    layers: tuple[str, ...] | None = None,
    training: HeadTraining | None = None,
    progress: Progress | None = None,
) -> DkNNB:
    """Heads for the voters of a classifier. What this process has trained before is taken from memory.

    Args:
        layers: None takes those that vote.
        training: how; the defaults of `HeadTraining` when left out.
        progress: where to report.

    Raises:
        InputError: an unknown layer, two voters of different k or metric at one layer, or a single reference.
    """
    training = HeadTraining() if training is None else training
    heads: dict[str, Head] = {}
    for voter in head_voters(classifier, layers):
        head = trained_head(voter, classifier.n_classes, training, progress)
        if heads.setdefault(voter.layer, head) is not head:
            raise InputError(
                f"two voters of layer {voter.layer!r} differ in k or metric, so one head cannot stand in for both; "
                "train heads for each classifier on its own."
            )
    return DkNNB(heads, training)


def trained_head(voter: Voter, n_classes: int, training: HeadTraining, progress: Progress | None = None) -> Head:
    """The head that stands in for one voter."""
    key = (votes_of(voter), training)
    if key not in _HEADS:
        _HEADS[key] = _train(voter, n_classes, training, progress or Silent())
        if len(_HEADS) > _KEPT_HEADS:
            _HEADS.popitem(last=False)
    _HEADS.move_to_end(key)
    return _HEADS[key]


@torch.no_grad()
def reference_votes(voter: Voter, positions: Tensor, n_classes: int, progress: Progress | None = None) -> Tensor:
    """The vote fractions p (n, C) of some references, each among the others.

    A reference is not its own neighbor: k + 1 are searched and it is taken out, else the last. Copies of it stay.

    Raises:
        InputError: there is no other reference.
    """
    references = voter.references
    if len(references) < 2:
        raise InputError("heads learn from the neighbors of references, and there is but one; add references.")
    progress = progress or Silent()
    wanted, parts = min(voter.n_neighbors + 1, len(references)), []
    progress.start(f"neighbors of references at {voter.layer}", len(positions))
    try:
        for part in positions.split(_SEARCHED):
            found = voter.index.search(references.rows(voter.layer, part), wanted)
            itself = found.ids == part.to(found.ids.device)[:, None]
            itself[:, -1] |= ~itself.any(1)
            kept = itself.long().argsort(dim=1, stable=True)[:, : wanted - 1]
            others = Neighbors(found.distances.gather(1, kept), found.ids.gather(1, kept))
            counts = count_votes(voter.votes(others), n_classes)
            parts.append(counts / counts.sum(1, keepdim=True).clamp_min(1))
            progress.advance(len(part))
    finally:
        progress.stop()
    return torch.cat(parts)


@torch.inference_mode(False)
@torch.enable_grad()
def _train(voter: Voter, n_classes: int, training: HeadTraining, progress: Progress) -> Head:
    """Full-batch L-BFGS on a convex loss: nothing to draw but the references, and no rate to choose."""
    votes = votes_of(voter)
    drawn = (votes, training.max_references, training.seed)
    if drawn not in _VOTES:
        order = rng.permutation(len(voter.references), training.seed, "heads")[: training.max_references]
        _VOTES[drawn] = order, reference_votes(voter, order, n_classes, progress).cpu()
        if len(_VOTES) > _KEPT_VOTES:
            _VOTES.popitem(last=False)
    positions, p = _VOTES[drawn]
    samples = _Samples(voter, positions, p, training)
    n_held = len(positions) // _HELD_OUT if len(positions) >= _FEWEST else 0
    held, learned = slice(0, n_held), slice(n_held, len(positions))
    device = voter.references.device
    weight = torch.zeros(n_classes, samples.center.numel(), device=device, requires_grad=True)
    bias = torch.zeros(n_classes, device=device, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_ROUND, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        return samples.loss(weight, bias, learned, training.penalty)

    best, least, waited = (weight.detach().clone(), bias.detach().clone()), float("inf"), 0
    progress.start(f"head of {voter.layer}", training.steps)
    try:
        for first in range(0, training.steps, _ROUND):
            search.param_groups[0]["max_iter"] = min(_ROUND, training.steps - first)
            search.step(closure)
            progress.advance(_ROUND)
            with torch.no_grad():
                now = float(samples.loss(weight, bias, held if n_held else learned))
            if now < least:
                best, least, waited = (weight.detach().clone(), bias.detach().clone()), now, 0
            else:
                waited += 1
                if waited == _PATIENCE:
                    break
    finally:
        progress.stop()
    spread = samples.spread(*best)
    return Head(best[0] / samples.scale, best[1], samples.center, samples.unit, spread, votes)


class _Samples:
    """The references to learn from, their features read in batches: centered, of a mean squared length of 1."""

    def __init__(self, voter: Voter, positions: Tensor, p: Tensor, training: HeadTraining) -> None:
        self.voter, self.positions, self.training = voter, positions, training
        self.unit = training.features == "voter" and voter.metric == "cosine"
        self.p, self.t = p, decide(p)
        dim = voter.references.dim(voter.layer)
        self.rows = max(1, _BYTES // (4 * dim))
        total = torch.zeros(dim, dtype=torch.float64, device=voter.references.device)
        for part in positions.split(self.rows):
            total += self._read(part).double().sum(0)
        mean = total / len(positions)
        squared = 0.0
        for part in positions.split(self.rows):
            squared += float((self._read(part).double() - mean).square().sum())
        self.center, self.scale = mean.float(), (squared / len(positions)) ** 0.5 or 1.0

    def _read(self, positions: Tensor) -> Tensor:
        z = self.voter.references.rows(self.voter.layer, positions)
        return prepared(z.to(torch.promote_types(z.dtype, torch.float32)), "cosine" if self.unit else "l2")

    def _features(self, positions: Tensor) -> Tensor:
        z = self._read(positions)
        return ((z - self.center.to(z)) / self.scale).float()

    def loss(self, weight: Tensor, bias: Tensor, which: slice, penalty: float = 0.0) -> Tensor:
        """The mean loss of some samples with the penalty, its gradient added to weight and bias where they take one."""
        positions, p, t = self.positions[which], self.p[which], self.t[which]
        share = len(positions) * (self.training.weight + 1 if self.training.consistency else 1)
        total = torch.zeros((), dtype=torch.float64)
        for part, p_part, t_part in zip(*(v.split(self.rows) for v in (positions, p, t)), strict=True):
            logits = nn.functional.linear(self._features(part), weight, bias)
            loss = head_loss(logits, p_part.to(logits), t_part.to(logits.device), self.training.weights).sum() / share
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        length = penalty * weight.square().sum()
        if length.requires_grad:
            length.backward()
        return total + float(length.detach())

    @torch.no_grad()
    def spread(self, weight: Tensor, bias: Tensor) -> float:
        """The root mean square of the logits about each sample's mean."""
        squared = 0.0
        for part in self.positions.split(self.rows):
            logits = nn.functional.linear(self._features(part), weight, bias).double()
            squared += float((logits - logits.mean(1, keepdim=True)).square().mean(1).sum())
        return math.sqrt(squared / len(self.positions))
