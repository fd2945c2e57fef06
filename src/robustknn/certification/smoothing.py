"""Randomised smoothing of the hard decision: any classifier over any index, L2 in the input.

Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", arXiv 1902.02918.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.certification.base import ABSTAINS, Certified, Certifier
from robustknn.certification.confidence import inward, share_at_least
from robustknn.certification.noise import check_smoothing, said_of_noise
from robustknn.certification.smoothed import check_base, decisions
from robustknn.checks import Bounds, check_positive_int
from robustknn.classifiers import Classifier
from robustknn.classifiers.under_noise import GaussianNoise
from robustknn.progress import Progress


@registry.certifiers.register("smoothing")
@dataclass(frozen=True)
class Smoothing(Certifier):
    """How far an input may move, in L2, before any classifier's most frequent decision under Gaussian noise can change.

    What is certified is the *smoothed* classifier g(x) = argmax_c P(f(x + N(0, σ²I)) = c), `Smoothed`, not f. The first
    n0 draws choose a class A; n further ones give a lower bound p of P(f(x + noise) = A) at confidence 1 − alpha
    (Clopper–Pearson). Where p > 1/2, g is A within the radius σ Φ⁻¹(p) (the paper's theorem 1 with p_B = 1 − p), else
    the certificate abstains. f may be anything: an approximate index is as good as an exact one, and a classifier that
    draws random numbers (RAILS) draws anew in every draw, which the theorem allows as its numbers do not depend on the
    input or the noise; it is then g with these draws that is certified. A rejected draw counts against A.

    No radius exceeds σ Φ⁻¹(alpha^(1/n)): 2.5 σ for n = 1,000, 3.2 σ for 10,000, 3.8 σ for the paper's 100,000.

    Args:
        sigma: σ, in the unit of the inputs. Larger ones certify larger radii and fewer samples.
        n0: draws that choose the class.
        n: draws that bound its probability; the cost is n forward passes a sample.
        alpha: how often a certificate may be wrong, each sample by itself.
        clip: (low, high), to which noisy inputs are clipped before f sees them, for an f that refuses others. Clipping
            is then a part of f, and the certificate holds as before; it is the noisy input that is clipped, never an
            input or a radius. None, as the paper has it, leaves the noise whole.
        batch_size: draws at once; it changes nothing but memory.
    """

    name: ClassVar[str] = "smoothing"
    unit: ClassVar[str] = "L2 of the input"
    of: ClassVar[str] = "the smoothed classifier"

    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    clip: Bounds | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_positive_int(self.n0, "n0")
        bounds = check_smoothing(self.sigma, self.n, self.alpha, self.clip, self.batch_size)
        object.__setattr__(self, "clip", bounds)  # a list where it came from JSON

    def check(self, classifier: Classifier) -> None:
        check_base(self.name, classifier)

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        noise = GaussianNoise(self.sigma, seed, self.clip, self.batch_size)
        progress.start("smoothing, draws", len(x) * (self.n0 + self.n))
        try:
            seen = decisions(classifier, x, sample_ids, noise, self.n0, "choose", progress.advance)
            chosen = seen[:, :-1].argmax(1)
            held = decisions(classifier, x, sample_ids, noise, self.n, "estimate", progress.advance)
        finally:
            progress.stop()
        share = share_at_least(held.gather(1, chosen[:, None])[:, 0], self.n, self.alpha)
        radius = inward(self.sigma * torch.special.ndtri(share))
        certain = radius > 0
        return Certified(
            torch.where(certain, chosen, ABSTAINS),
            torch.where(certain, radius, -1.0),
            self.unit,
            self._assumptions(),
        )

    def _assumptions(self) -> tuple[str, ...]:
        return (
            "Certified is the smoothed classifier, which decides by the most frequent decision under noise, not the "
            "classifier itself; the network and the references are fixed and trusted.",
            said_of_noise(self.sigma, self.clip),
            f"Each certificate is wrong with probability at most {self.alpha:g} over its {self.n0} + {self.n} draws.",
        )
