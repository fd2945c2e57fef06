"""Randomised smoothing of the embedding: the k nearest of the mean feature under Gaussian noise, L2 in the input.

The setting is that of RetrievalGuard (Wu et al., arXiv 2206.11225: Recall@1 of 1-NN retrieval) and of Pautov et al.
(arXiv 2202.01186: nearest prototypes); k votes and the sharper radius below are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustknn import registry, store
from robustknn.certification.base import ABSTAINS, Certified, Certifier, refused
from robustknn.certification.bisectors import depths, surroundings
from robustknn.certification.bisectors_scene import Scene, why_not
from robustknn.certification.confidence import inward, mean_error
from robustknn.certification.noise import check_smoothing, said_of_noise
from robustknn.checks import Bounds, check_positive_int, check_whole
from robustknn.classifiers import KNN, Classifier, Voter
from robustknn.classifiers.randomized import numbered
from robustknn.classifiers.rules import TIE
from robustknn.classifiers.under_noise import GaussianNoise, UnderNoise
from robustknn.errors import InputError
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet

NAME = "smoothed-embedding"
_ONE = 1 << 40
"""Features are summed as whole multiples of 1/_ONE, whose sum does not depend on their order."""
_NEAREST = 128
"""Of its own class, as many of the nearest references are compared with others."""
_ROUNDING = 1e-9
"""More than such sums, of features of up to 10⁶ numbers, can move a mean."""


@registry.certifiers.register(NAME)
@dataclass(frozen=True)
class EmbeddingSmoothing(Certifier):
    """How far an input may move, in L2, before the majority of its mean feature's neighbors under noise can change.

    With f the feature scaled to unit length and g(x) = E f(x + N(0, σ²I)), certified is the classifier that takes the
    majority label of the k references nearest to g(x), `SmoothedEmbedding`. The references are the classifier's own
    vectors, scaled to unit length, and fixed: whether they were averaged under noise too (`smoothed_references`) or not
    makes no difference to the certificate, which holds for any vectors.

    A reference q stays farther from g than p while ⟨g, u⟩ > 0 for u = (p − q)/‖p − q‖. ⟨f, u⟩ lies in [−1, 1], so
    Φ⁻¹((1 + ⟨g, u⟩)/2) changes by at most ‖δ‖/σ (Salman et al., arXiv 1906.04584, lemma 2). With r the bisector radius
    of the vote around the mean ĝ of n draws, and e the bound of ‖ĝ − g‖ at confidence 1 − alpha (`mean_error`), the
    decision holds within σ Φ⁻¹((1 + r − e)/2), where r > e. That is never less than σ √(π/2) (r − e), what follows from
    g being √(2/(πσ²))-Lipschitz.

    Args:
        sigma: σ, in the unit of the inputs.
        n: draws a sample.
        alpha: how often a certificate may be wrong, each sample by itself.
        clip: (low, high), to which noisy inputs are clipped before the network, as a part of it.
        batch_size: draws at once; it changes nothing but memory.
    """

    name: ClassVar[str] = NAME
    unit: ClassVar[str] = "L2 of the input"
    of: ClassVar[str] = "the classifier on smoothed features"

    sigma: float = 0.25
    n: int = 10_000
    alpha: float = 0.001
    clip: Bounds | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        bounds = check_smoothing(self.sigma, self.n, self.alpha, self.clip, self.batch_size)
        object.__setattr__(self, "clip", bounds)

    def check(self, classifier: Classifier) -> None:
        _knn(classifier)

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        knn = _knn(classifier)
        voter = knn.voters[0]
        noise = GaussianNoise(self.sigma, seed, self.clip, self.batch_size)
        progress.start("smoothing, draws", len(x) * self.n)
        try:
            mean = mean_feature(_reader(knn), x, sample_ids, noise, self.n, "embedding", progress.advance)
        finally:
            progress.stop()
        scores = _votes(knn, mean)
        labels = knn.decide(scores)
        found = margins(voter, mean, labels.cpu()).to(mean.device)
        held = found - mean_error(mean.norm(dim=1), self.n, self.alpha) - _ROUNDING
        radius = inward(self.sigma * torch.special.ndtri((1 + held.clamp(0, 1)) / 2))
        certain = (held > 0) & (knn.lead(scores, labels) > TIE)
        return Certified(
            torch.where(certain, labels, ABSTAINS),
            torch.where(certain, radius, -1.0),
            self.unit,
            (
                "Certified is the classifier that looks for the neighbors of the mean feature under noise, not the "
                "classifier itself; the network and the references are fixed and trusted.",
                said_of_noise(self.sigma, self.clip),
                f"Each certificate is wrong with probability at most {self.alpha:g} over its {self.n} draws.",
            ),
        )


class SmoothedEmbedding(UnderNoise[KNN]):
    """The majority label of the k references nearest to the mean of a sample's unit features under Gaussian noise.

    Args:
        base: a KNN by cosine.
        sigma: the standard deviation of the noise, in the unit of the inputs.
        n: draws a decision.
        clip: (low, high), to which noisy inputs are clipped before the network.
        seed: of the draws, which are counted from the samples' ids.
        batch_size: draws at once.

    Raises:
        InputError: another classifier, or a parameter out of range.
    """

    def __init__(
        self,
        base: KNN,
        sigma: float = 0.25,
        n: int = 100,
        *,
        clip: Bounds | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        self.base = _knn(base)
        self.sigma, self.n, self.batch_size = sigma, n, batch_size
        self.clip = check_smoothing(sigma, n, 0.5, clip, batch_size)
        self.seed, self.n_classes = check_whole(seed, "seed"), base.n_classes

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        x = self.place(x)
        ids = numbered(x, sample_ids)
        mean = mean_feature(_reader(self.base), x, ids, self.noise, self.n, "predict")
        return _votes(self.base, mean)

    def fingerprint(self) -> str:
        said = {"type": NAME, **{name: getattr(self, name) for name in ("n", "sigma", "seed", "clip")}}
        return store.fingerprint_config({**said, "base": self.base.fingerprint()})

    def __repr__(self) -> str:
        return f"SmoothedEmbedding({self.base!r}, sigma={self.sigma:g}, n={self.n})"


@torch.no_grad()
def smoothed_references(
    references: ReferenceSet,
    sigma: float,
    n: int = 100,
    *,
    layer: str | None = None,
    clip: Bounds | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> ReferenceSet:
    """The references with, in place of their features, the mean of their unit features under n draws of noise.

    Where noise moves all features alike, the mean feature of an input lies nearer to these than to plain ones.

    Args:
        references: with their images and their network.
        layer: which of their layers; may be left out when there is one.

    Raises:
        InputError: several layers and none chosen.
        NotReadyError: no images were kept, or no network is known.
    """
    if layer is None and len(references.layers) > 1:
        raise InputError(f"the references hold {len(references.layers)} layers; choose one with layer=.")
    layer = references.layer(layer or references.layers[0])
    extractor = references.extractor().select([layer])
    noise, n = GaussianNoise(sigma, seed, clip, batch_size), check_positive_int(n, "n")
    parts = []
    for places in torch.arange(len(references)).split(max(1, 4096 // n)):
        x = extractor.place(references.image(places))
        mean = mean_feature(lambda v: extractor(v)[layer], x, places.to(x.device), noise, n, "references")
        parts.append(mean.to(x.dtype))
    made = ReferenceSet.from_vectors(
        {layer: torch.cat(parts)}, references.labels, features=extractor, n_classes=references.n_classes
    )
    made.made_by = {"smoothed": {"sigma": sigma, "n": n, "clip": noise.clip, "seed": seed}}
    return made


def mean_feature(
    read: Callable[[Tensor], Tensor],
    x: Tensor,
    sample_ids: Tensor,
    noise: GaussianNoise,
    n: int,
    purpose: str,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The mean feature (N, D) float64, at unit length before it is averaged, of n draws of each sample.

    Args:
        read: inputs (B, …) → features (B, D).
    """
    total: Tensor | None = None
    for drawn in noise.draws(x, sample_ids, n, purpose):
        z = nn.functional.normalize(read(drawn.x).double(), dim=1)
        if total is None:
            total = torch.zeros(len(x), z.shape[1], dtype=torch.int64, device=x.device)
        total.index_add_(0, drawn.rows, (z * _ONE).round().to(torch.int64))
        advance(len(z))
    assert total is not None
    return total.double() / (_ONE * n)


def margins(voter: Voter, means: Tensor, labels: Tensor) -> Tensor:
    """How far each mean (N, D) may move before it is as near to the k-th deciding reference of another class, (N,).

    By the bisectors of `feature-bisector`, among references of unit length; each by itself, so that others in the batch
    do not change its last bit.
    """
    scene, k = Scene(voter), voter.n_neighbors
    a, b = torch.tensor([k // 2 + 1]), torch.tensor([k - k // 2])
    found = torch.zeros(len(means), dtype=torch.float64)
    for i in range(len(means)):
        queries = scene.place(means[i : i + 1])
        for _, around, anchor in next(surroundings(scene, queries, labels[i : i + 1], max(_NEAREST, int(a)), int(a))):
            found[i] = queries.radius(0, float(depths(around, anchor, a, b)))
    return found


def _votes(knn: KNN, mean: Tensor) -> Tensor:
    """The scores (N, C) of means (N, D) float64."""
    voter = knn.voters[0]
    near = voter.index.search(mean.to(voter.references.vectors(voter.layer, unit=True)[0].dtype), voter.n_neighbors)
    return knn.combine([voter.votes(near)])


def _reader(knn: KNN) -> Callable[[Tensor], Tensor]:
    layer = knn.voters[0].layer
    return lambda x: knn.read(x, [layer])[layer]


def _knn(classifier: Classifier) -> KNN:
    """The classifier, where its embedding can be smoothed."""
    if not isinstance(classifier, KNN):
        raise refused(
            NAME, classifier, "the labels of one layer's k nearest must decide; pass a KNN, or use 'smoothing'."
        )
    if classifier.extractor is None:
        raise refused(NAME, classifier, "it knows no network, so no noisy input can be read; give it features=.")
    if classifier.voters[0].metric != "cosine":
        how = "how fast a mean feature moves is known of features of unit length alone; use metric='cosine'."
        raise refused(NAME, classifier, f"its metric is {classifier.voters[0].metric!r}, and {how}")
    why = why_not(classifier)
    if why is not None:
        raise refused(NAME, classifier, f"{why.rstrip('.')}, or 'smoothing', which allows it.")
    return classifier
