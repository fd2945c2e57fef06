"""What it costs to certify by randomised smoothing, in units of the draws' bare forward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.record import Figure, Result
from benchmarks.timing import against
from robustknn import KNN, FeatureExtractor, ReferenceSet
from robustknn.certification import Certifier, EmbeddingSmoothing, Smoothing
from robustknn.classifiers import Classifier, Network
from robustknn.models import MnistCNN
from robustknn.training import initialise

BATCH, K, SIGMA = 256, 15, 0.25
BOUND, SEARCHED = 1.2, 1.15
WHAT = (
    "Certificates of MNIST images by smoothing (n draws each and n0 = 256 that choose the class; MNIST CNN, batches of "
    "256), in units of as many bare forward passes of the network; for kNN (k = 15, last convolution) also in units of "
    "the forward passes and the bare searches of their features."
)


def run(quick: bool) -> Result:
    """Time certificates of a few images."""
    samples, n, repeats, references = (1, 256, 1, 300) if quick else (2, 1024, 5, 10_000)
    model = initialise(lambda: MnistCNN(form="unpadded"), 0).eval()
    generator = torch.Generator().manual_seed(0)
    x, stored = (torch.rand(m, 1, 28, 28, generator=generator) for m in (samples, references))
    features = FeatureExtractor(model, [MnistCNN.feature_layers[2]])
    held = ReferenceSet.build(features, (stored, torch.arange(references) % 10))
    plain, cosine = KNN(held, K), KNN(held, K, metric="cosine")
    decision, embedding = Smoothing(SIGMA, BATCH, n), EmbeddingSmoothing(SIGMA, n + BATCH)
    noisy = torch.rand(BATCH, 1, 28, 28, generator=generator)
    (layer,), passes = features.layers, samples * (n + BATCH) // BATCH

    @torch.no_grad()
    def forward() -> None:
        for _ in range(passes):
            model(noisy)

    @torch.no_grad()
    def searched() -> None:
        for _ in range(passes):
            plain.voters[0].index.search(features(noisy)[layer], K)

    def certified(certifier: Certifier, classifier: Classifier) -> Tensor:
        return certifier(classifier, x).radius

    found = against(
        forward,
        {
            "the network's own decision": lambda: certified(decision, Network(model, 10)),
            f"kNN, {references:,} references": lambda: certified(decision, plain),
            f"embedding, {references:,} references": lambda: certified(embedding, cosine),
        },
        repeats,
    )
    beside = against(searched, {"kNN": lambda: certified(decision, plain)}, repeats)["kNN"]
    bounds = (BOUND, None, BOUND)
    figures = [
        Figure.of(f"{name}, in units of the forward passes", ratio, bound)
        for (name, ratio), bound in zip(found.items(), bounds, strict=True)
    ]
    figures.append(Figure.of("kNN, in units of the forward passes and searches", beside, SEARCHED))
    settings = {"samples": samples, "draws": n + BATCH, "references": references, "k": K}
    return Result(WHAT, repeats, figures, settings)
