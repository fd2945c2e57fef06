"""What the torch modules of a classifier share: one row a decision, wherever and in whatever precision inputs come."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from robustknn.attacks.base import padded_rows
from robustknn.checks import check_choice
from robustknn.classifiers import Classifier, Rejecting, check_classifier
from robustknn.errors import InputError


class ClassifierModule(nn.Module):
    """A classifier as a module of class scores (N, C), whose arg max is its decision.

    The classifier is no submodule: `train()`, `to()` and `requires_grad_()` of the module leave the network alone, and
    inputs are brought to where the classifier is. A parameter without use tells other libraries a device.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        check_classifier(classifier)
        if isinstance(classifier, Rejecting):
            raise InputError(
                "a classifier that rejects has a decision that is no class; pass the DkNN inside it, or use attacks of "
                "robustknn, which know what rejecting means."
            )
        self._held = (classifier,)
        device = None if classifier.extractor is None else classifier.extractor.device
        self.place = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)
        self.eval()

    @property
    def classifier(self) -> Classifier:
        """What answers."""
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, C), of x's precision and on its device.

        Args:
            x: (N, …) inputs.
        """
        # Small batches are filled up as they are in attacks, so that both see the same decisions.
        rows = padded_rows(torch.arange(len(x), device=x.device))
        placed = self.classifier.place(x)[rows.to(self._device(x))]
        return self.answers(placed)[: len(x)].to(x)

    def _device(self, x: Tensor) -> torch.device:
        extractor = self.classifier.extractor
        return x.device if extractor is None else extractor.device

    @abstractmethod
    def answers(self, x: Tensor) -> Tensor:
        """Scores (N, C) of inputs that are where the classifier is."""


class HardScores(ClassifierModule):
    """The classifier's own scores, without gradient.

    Args:
        classifier: any classifier.
        kind: "scores" for what it computes (vote shares), "one-hot" for its decision alone.
    """

    def __init__(self, classifier: Classifier, kind: str = "scores") -> None:
        super().__init__(classifier)
        self.kind = check_choice(kind, ("scores", "one-hot"), "kind")

    @torch.no_grad()
    def answers(self, x: Tensor) -> Tensor:
        scores = self.classifier.scores(x)
        winner = self.classifier.decide(scores)
        if self.kind == "one-hot":
            return nn.functional.one_hot(winner, scores.shape[1]).to(scores)
        return lifted(scores, winner)


def lifted(scores: Tensor, winner: Tensor, by: float = 1e-4) -> Tensor:
    """Scores (N, C) with the winner's raised, where need be, until it leads all others: a tie has one winner.

    Args:
        winner: (N,).
        by: how far it leads then, as a share of the largest score in absolute value (or 1).
    """
    others = scores.detach().scatter(1, winner[:, None], float("-inf")).amax(1)
    least = by * scores.detach().abs().amax(1).clamp_min(1.0)
    missing = (others + least - scores.detach().gather(1, winner[:, None])[:, 0]).clamp_min(0)
    return scores.scatter_add(1, winner[:, None], missing[:, None].to(scores))


def as_hard(classifier: Classifier, kind: str = "scores") -> HardScores:
    """A classifier as a module of its hard scores (N, C), without gradient: for black-box attacks of any library.

    Args:
        classifier: any classifier.
        kind: "scores" for what it computes (vote shares), "one-hot" for its decision alone.
    """
    return HardScores(classifier, kind)
