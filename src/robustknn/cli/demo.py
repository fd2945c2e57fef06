"""The demo: a small network on scikit-learn's digits, its kNN and DkNN, attacks on them, published and worst."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from robustknn import registry
from robustknn.classifiers import KNN, DkNN
from robustknn.datasets import load
from robustknn.errors import ResumeError
from robustknn.evaluation import Options, RunDirectory, evaluate
from robustknn.evaluation.experiment import calibration_overlap, choose
from robustknn.features import FeatureExtractor
from robustknn.models import DigitsCNN
from robustknn.progress import Console
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel
from robustknn.training import TrainConfig, initialise, train

K, EPS, STEPS, EPOCHS = 15, 0.15, 40, 25
LAYERS = DigitsCNN.feature_layers[1:3]  # the last two convolutions
CURVE, QUICK_CURVE, QUICK_SAMPLES = (0.05, 0.1, 0.2), (), 60


def run_demo(out: Path, seed: int, quick: bool) -> RunDirectory:
    """Train, attack, and leave the rows in `out` (or beside it, when it holds another run)."""
    # Tensors this small lose more to threads waiting for each other than they gain.
    torch.set_num_threads(1)
    progress = Console()
    source = load("digits", protocol="published")
    model = initialise(DigitsCNN, seed)
    train(model, source, TrainConfig(epochs=EPOCHS, batch_size=64, lr=2e-3, seed=seed), progress=progress)
    references = ReferenceSet.build(
        FeatureExtractor(model, LAYERS), source.train, n_classes=source.n_classes, keep_images=True
    )
    knn = KNN(references, n_neighbors=K, layer=DigitsCNN.embedding_layer)
    dknn = DkNN(references, n_neighbors=K).calibrate(source.calibration)
    # A random choice: the published split calibrates on the first samples, which are not scored.
    samples = choose(source.test, QUICK_SAMPLES if quick else None, "random", seed)
    for place in _places(out):
        try:
            return evaluate(
                {"knn": knn, "dknn": dknn},
                samples,
                attacks={
                    "published": registry.attacks.create("published"),
                    **{n: registry.attacks.create(n, steps=STEPS) for n in ("ask-published", "pgd-transfer", "ask")},
                    "worst-case-fast": registry.attacks.create("worst-case-fast"),
                },
                threat=ThreatModel("linf", EPS),
                eps=QUICK_CURVE if quick else CURVE,
                out=place,
                options=Options(seed=seed, controls=0 if quick else 100),
                exclude={"dknn": calibration_overlap(source, samples)},
                class_names=source.class_names,
                describe={"data": "digits", "protocol": "published", "model": "digits-cnn", "checkpoint": None},
                progress=progress,
            )
        except ResumeError:
            print(f"{str(place)!r} holds another run and is left alone.", file=sys.stderr)
    raise AssertionError("unreachable: folders are tried without end")


def _places(out: Path) -> list[Path]:
    return [out, *(out.with_name(f"{out.name}-{i}") for i in range(2, 1000))]
