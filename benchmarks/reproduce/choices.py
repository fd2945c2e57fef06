"""What settings in the code were chosen from: `python -m benchmarks.reproduce.choices SECTION … [--results FILE]`.

All on images that are in no test. Sections: `transformations` (what stands in for the gradient of rounding; CIFAR-10),
`bits` (the same for the signs of features), `labels` (the label filter's k and its preliminary network), `rails`
(the attack on RAILS, its temperature, how far plain attacks get); the last three on digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import kept
from robustknn import KNN, PGD, Adaptive, CrossEntropy, FeatureExtractor, ReferenceSet, RetrievalClassifier, ThreatModel
from robustknn.attacks import APGD, Attack, Square
from robustknn.classifiers import (
    JPEG,
    RAILS,
    BitDepth,
    Classifier,
    InputTransform,
    Network,
    Randomized,
    TotalVariation,
    Transformed,
    input_transforms,
    rails,
)
from robustknn.datasets import Split, load
from robustknn.models import DigitsCNN, load_model
from robustknn.objectives import Evolved, ThroughTransform
from robustknn.recipes import WorstCase, web_scale_features
from robustknn.training import TrainConfig, accuracy, filter_labels, initialise, train, with_symmetric_noise
from robustknn.transforms import Signs, signs

Rows = dict[str, dict[str, float]]
SCALES = {"1": 1.0, "1/4": 1 / 4, "1/16": 1 / 16, "1/64": 1 / 64}


@dataclass(frozen=True)
class IdentityGradient(InputTransform):
    """A transformation with the gradient of the identity."""

    inner: InputTransform

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return input_transforms.straight_through(self.inner(x.detach(), ids, seed), x)


def transformations(data: Path, report: Callable[[str, str, float], None]) -> None:
    """Rows: how the gradient is estimated and which attack; columns: transformations of 48 training images."""
    source = load("cifar10", root=data, protocol="published")
    network = load_model("resnet20", data / "models" / "resnet20-12fca82f.th").eval()
    part = source.train.subset(torch.arange(5000, 5048))
    x, y = part.batch(torch.arange(len(part))), part.labels
    threat = ThreatModel("l2", 0.005 * x.flatten(1).norm(dim=1))
    for transform in (BitDepth(3), JPEG(75), TotalVariation()):
        name = type(transform).__name__
        victim, plain = (Transformed(network, 10, t) for t in (transform, IdentityGradient(transform)))
        report("clean", name, right(victim, x, y))
        for steps, attack in (
            ("PGD, 40 steps", PGD(ThroughTransform(), steps=40)),
            ("APGD, 100 steps", APGD(ThroughTransform(), steps=100)),
        ):
            report(f"identity, {steps}", name, left(attack, plain, x, y, threat))
            for scale, near in SCALES.items():
                if isinstance(transform, TotalVariation) and scale != "1/16":
                    continue  # nothing is rounded there
                with patch.object(input_transforms, "_NEAR", near):
                    report(f"{scale}, {steps}", name, left(attack, victim, x, y, threat))
        report("square, 600 queries", name, left(Square(queries=600), victim, x, y, threat))


@contextmanager
def signs_as(soft: Callable[[Tensor], Tensor] | float) -> Iterator[None]:
    """Signs whose gradient is that of `soft` of the number u behind the bit over its spread, or of u/(soft + |u|)."""

    def call(self: Signs, value: Tensor) -> Tensor:
        number = (value.flatten(1) - self.center.to(value)) / self.scale.to(value)
        hard = torch.where(number >= 0, torch.ones_like(number), -torch.ones_like(number))
        return input_transforms.straight_through(hard, soft(number))  # type: ignore[operator]

    with patch.object(signs, "_NEAR", soft) if isinstance(soft, float) else patch.object(Signs, "__call__", call):
        yield


def bits(report: Callable[[str, str, float], None]) -> None:
    """Rows: what stands in for the gradient of a bit; columns: layers, two training seeds each; 200 images."""
    softs: dict[str, Callable[[Tensor], Tensor] | float] = {
        "straight through": lambda u: u,
        "tanh(u)": torch.tanh,
        **{f"u/({name} + |u|)": near for name, near in SCALES.items() if name != "1/64"},
    }
    train_part, held = development(200)
    x, y, threat = held.batch(torch.arange(200)), held.labels, ThreatModel("linf", 0.06)
    few, labels = x[:100], y[:100]
    seen = torch.arange(len(train_part)) % 2 == 0
    for seed in (0, 1):
        model = fitted(train_part.subset(seen), seed, 20)
        database = train_part.subset(~seen)
        gray = PGD(CrossEntropy(), steps=40)(Network(model, 10), x, y, threat).x_adv
        for layer in ("relu2", "relu3", "relu3:input"):
            column, attack = f"{layer}, seed {seed}", PGD(Adaptive(), steps=40)
            victim, smooth = (retrieval(model, layer, database, r) for r in ("rmac-bits", "rmac"))
            report("no attack", column, right(victim, x, y))
            report("examples of the network", column, right(victim, gray, y))
            report("examples without bits", column, right(victim, attack(smooth, x, y, threat).x_adv, y))
            for name, soft in softs.items():
                with signs_as(soft):
                    report(f"adaptive, {name}", column, left(attack, victim, x, y, threat))
            if layer == "relu3":
                report(
                    "square, 500 queries, 100 images",
                    column,
                    left(Square(queries=500), victim, few, labels, threat),
                )
                report("worst case, 100 images", column, left(WorstCase(), victim, few, labels, threat))


def retrieval(model: DigitsCNN, layer: str, database: Split, recipe: str) -> RetrievalClassifier:
    """15 neighbors among unlabelled images by 64 components."""
    features = web_scale_features(model, layer, database, n_components=64, recipe=recipe)
    return RetrievalClassifier(ReferenceSet.build(features, database, payload="softmax", labels="payload"), 15)


def labels(report: Callable[[str, str, float], None]) -> None:
    """Rows: training seeds; columns: wrong labels kept of 30 %, and accuracy on validation after filtering."""
    source = load("digits")
    assert source.validation is not None
    for seed in range(3):
        noisy = with_symmetric_noise(source.train, 0.3, source.n_classes, seed)
        wrong = noisy.labels != source.train.labels
        report(f"seed {seed}", "wrong labels", int(wrong.sum()))
        for epochs, neighbors in ((5, (10, 20, 50)), (25, (5, 10, 20, 50, 80))):
            preliminary = fitted(noisy, seed, epochs)
            for k in neighbors:
                found = filter_labels(preliminary, noisy, k)
                report(f"seed {seed}", f"kept wrong, {epochs} epochs, k = {k}", int((found.kept & wrong).sum()))
                if epochs == 25:
                    after = accuracy(fitted(found.split, seed, 25), source.validation)
                    report(f"seed {seed}", f"accuracy, {epochs} epochs, k = {k}", after)


def evolution(report: Callable[[str, str, float], None]) -> None:
    """Rows: attacks; columns: what is right by fresh draws (or by the draw that was attacked); 40 or 60 images."""
    train_part, held = development(250)
    model = fitted(train_part, 0, 25)
    references = ReferenceSet.build(FeatureExtractor(model, ["relu3"]), train_part, keep_images=True)
    x, y = held.batch(torch.arange(60)), held.labels[:60]
    for share in (100, 20, 5):
        with patch.object(rails, "_SELECTION", 1 / share):
            report(f"temperature 1/{share}", "clean, 60 images", right(RAILS(references), x, y))
    x, y = x[:40], y[:40]
    deployed = RAILS(references, population=300)
    small, threat = RAILS(references, population=200), ThreatModel("linf", 0.15)

    def fresh(name: str, found: Tensor, judge: Randomized = deployed) -> None:
        report(name, "fresh draws, 40 images", 1 - float(judge.fooled(found, y, draws=2).mean()))

    fresh("none", x)
    fresh("network, 40 steps", PGD(CrossEntropy(), steps=40)(Network(model, 10), x, y, threat).x_adv)
    for flock in (0.0, 0.5, 0.8, 1.0):
        for every in (2, 10):
            attack = PGD(Evolved(flock=flock), keep="last", steps=20, check_every=every, start="random")
            fresh(f"evolved, flock {flock:g}, a lookup every {every} steps", attack(small, x, y, threat).x_adv)
    for eps in (0.15, 0.2, 0.25, 0.3, 0.4):
        attack = PGD(keep="last", steps=100)
        fresh(f"ASK on 15 neighbors, {eps:g}", attack(KNN(references, 15), x, y, ThreatModel("linf", eps)).x_adv)
    quick = RAILS(references, population=100, generations=3)
    for name, suite in (("worst-case-fast", WorstCase("fast")), ("worst-case", WorstCase())):
        found = suite(quick, x, y, threat)
        report(
            f"{name}, 100 candidates, 3 generations",
            "the draw attacked, 40 images",
            float(found.robust.double().mean()),
        )
        fresh(f"{name}, 100 candidates, 3 generations", found.x_adv, quick)


def development(n: int) -> tuple[Split, Split]:
    """The published training images of the digits but for the last n, and these."""
    whole = load("digits", protocol="published").train
    places = torch.arange(len(whole))
    return whole.subset(places[:-n]), whole.subset(places[-n:])


def fitted(split: Split, seed: int, epochs: int) -> DigitsCNN:
    """A network trained on a part of the digits."""
    model = initialise(DigitsCNN, seed)
    source = replace(load("digits", protocol="published"), train=split, validation=None)
    train(model, source, TrainConfig(epochs=epochs, batch_size=64, lr=2e-3, seed=seed))
    assert isinstance(model, DigitsCNN)
    return model


def left(attack: Attack, classifier: Classifier, x: Tensor, y: Tensor, threat: ThreatModel) -> float:
    """The share that an attack leaves."""
    return float(attack(classifier, x, y, threat).robust.double().mean())


def right(classifier: Classifier, x: Tensor, y: Tensor) -> float:
    """The share that is right."""
    return float((classifier.labels(x) == y).double().mean())


def add(rows: Rows, row: str, column: str, value: float) -> None:
    """Keep and show a figure."""
    rows.setdefault(row, {})[column] = value
    print(f"{row} | {column} | {value:.3f}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure sections and print their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.choices")
    parser.add_argument("sections", nargs="+", choices=("transformations", "bits", "labels", "rails"))
    parser.add_argument("--data", type=Path, help="the folder with CIFAR-10 and, under models, the published ResNet-20")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON, beside other sections there")
    args = parser.parse_args(argv)
    if "transformations" in args.sections and args.data is None:
        parser.error("transformations are measured on CIFAR-10: --data FOLDER")
    torch.set_num_threads(1)
    found: dict[str, Rows] = {section: {} for section in args.sections}
    for section, rows in found.items():
        report = partial(add, rows)
        if section == "transformations":
            transformations(args.data, report)
        else:
            {"bits": bits, "labels": labels, "rails": evolution}[section](report)
    before = json.loads(args.results.read_text())["rows"] if args.results and args.results.exists() else {}
    kept.write_record(args.results, rows={**before, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
