"""The smoothed classifier itself, to be evaluated and attacked: Cohen, Rosenfeld & Kolter's PREDICT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustknn import store
from robustknn.certification.base import ABSTAINS, refused
from robustknn.certification.noise import check_smoothing
from robustknn.checks import Bounds, check_whole
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.classifiers.base import check_classifier
from robustknn.classifiers.randomized import numbered
from robustknn.classifiers.under_noise import GaussianNoise, UnderNoise


class Smoothed(UnderNoise[Classifier]):
    """The class that a classifier decides for most often under Gaussian noise, or none where that is not sure.

    Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", arXiv 1902.02918,
    section 3.2.1: of n draws the two most frequent decisions are compared by a binomial test; where the first is not
    the more likely one at confidence 1 − alpha, it abstains (label −1). An input on which it abstains counts as an
    error when it is clean, and as defended when it is attacked.

    The noise of a sample is counted from its id, the same in every call. An attacker who knows the seed fits these n
    draws; `fooled` says what his examples do in others.

    Args:
        base: any classifier; a randomised one draws anew in every draw of noise.
        sigma: the standard deviation of the noise, in the unit of the inputs.
        n: draws a decision.
        alpha: how often a decision may differ from that of infinitely many draws.
        clip: (low, high), to which noisy inputs are clipped before the base classifier sees them.
        seed: of the draws.
        batch_size: draws at once.

    Raises:
        InputError: a parameter out of range, or a base that is smoothed already.
    """

    def __init__(
        self,
        base: Classifier,
        sigma: float = 0.25,
        n: int = 100,
        *,
        alpha: float = 0.001,
        clip: Bounds | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        check_base("Smoothed", base)
        self.base, self.sigma, self.n, self.alpha = base, sigma, n, alpha
        self.clip = check_smoothing(sigma, n, alpha, clip, batch_size)
        self.seed, self.batch_size = check_whole(seed, "seed"), batch_size
        self.n_classes = base.n_classes

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """The share of draws that the base decides for each class, (N, C); a rejected draw counts for none."""
        x = self.place(x)
        ids = numbered(x, sample_ids)
        return decisions(self.base, x, ids, self.noise, self.n, "predict")[:, :-1].double() / self.n

    def decide(self, scores: Tensor) -> Tensor:
        from scipy.stats import binom

        counts = (scores * self.n).round().to(torch.int64)
        rejected = self.n - counts.sum(1, keepdim=True)
        top = counts.argmax(1)  # of equal ones the smallest number, and then the test is not passed
        most = counts.gather(1, top[:, None])[:, 0]
        second = torch.cat([counts.scatter(1, top[:, None], 0), rejected], 1).amax(1)
        both = (most + second).cpu().numpy()
        p = 2 * binom.sf(most.cpu().numpy() - 1, both, 0.5)
        return torch.where(torch.as_tensor(p <= self.alpha, device=scores.device), top, ABSTAINS)

    def lead(self, scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        lead = super().lead(scores, y, target)
        return torch.where(self.decide(scores) == ABSTAINS, lead.clamp_min(0), lead)

    def fingerprint(self) -> str:
        named = ("sigma", "n", "alpha", "clip", "seed")
        said = {"type": "smoothed", **{name: getattr(self, name) for name in named}}
        return store.fingerprint_config({**said, "base": self.base.fingerprint()})

    def __repr__(self) -> str:
        return f"Smoothed({self.base!r}, sigma={self.sigma:g}, n={self.n}, alpha={self.alpha:g})"


def decisions(
    base: Classifier,
    x: Tensor,
    sample_ids: Tensor,
    noise: GaussianNoise,
    n: int,
    purpose: str,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """How often each sample is decided for each class in n draws, (N, C + 1) int64; rejections come last.

    Args:
        x: (N, …) inputs, placed.
        sample_ids: (N,) identities.
        purpose: draws for another purpose are independent.
        advance: told how many draws are done.
    """
    columns = base.n_classes + 1
    counts = torch.zeros(len(x) * columns, dtype=torch.int64, device=x.device)
    for drawn in noise.draws(x, sample_ids, n, purpose):
        labels = base.labels(drawn.x, drawn.ids).to(x.device)
        labels = torch.where(labels < 0, base.n_classes, labels)
        counts += torch.bincount(drawn.rows * columns + labels, minlength=len(counts))
        advance(len(labels))
    return counts.view(len(x), columns)


def check_base(who: str, base: Classifier) -> None:
    """Refuse what cannot be smoothed."""
    check_classifier(base)
    if isinstance(base, UnderNoise):
        raise refused(who, base, "it is smoothed already; smooth the classifier inside it (.base).")
    if isinstance(base, VoterClassifier) and base.extractor is None:
        raise refused(who, base, "it knows no network, so no noisy input can be classified; give it features=.")
