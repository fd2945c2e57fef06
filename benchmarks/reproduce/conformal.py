"""Prediction sets of DkNN on MNIST and CIFAR-10: `python -m benchmarks.reproduce.conformal --help`.

Calibration and test samples are drawn from the official test part, many times: the sets must hold the true class at
least as often as they promise. Without ties the number covered in a draw is beta-binomial; ties only add, so no more
than 0.5 % of the draws may fall below the 0.5 % quantile of that. α of all test images is kept in the work folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks import kept
from robustknn import DkNN, FeatureExtractor, ReferenceSet, rng, store
from robustknn.classifiers.conformal import cutoffs
from robustknn.datasets import DataSource, load
from robustknn.models import load_model
from robustknn.progress import Console

COVERAGES = (0.8, 0.9, 0.95, 0.99)
CALIBRATION = 1000
DRAWS = 200
K = 75


def scene(args: argparse.Namespace, name: str) -> tuple[DataSource, FeatureExtractor]:
    """Data and features: the last layers, those of the CIFAR-10 network averaged over places."""
    if name == "mnist":
        model = load_model("mnist-cnn", args.mnist_model).eval()
        return load("mnist", root=args.data, protocol="published"), FeatureExtractor(model, ["relu3", "fc"])
    model = load_model("resnet20", args.cifar_model).eval()
    layers = ["layer2", "layer3", "linear"]
    return load("cifar10", root=args.cifar, protocol="published"), FeatureExtractor(model, layers, pool="avg")


def alphas(args: argparse.Namespace, name: str) -> tuple[Tensor, Tensor]:
    """α of every test image and class (10,000, 10), and the labels."""
    source, features = scene(args, name)
    file = args.work / f"conformal-{name}.safetensors"
    if not file.exists():
        train = source.train if args.per_class is None else source.train.per_class(args.per_class)
        dknn = DkNN(ReferenceSet.build(features, train, progress=Console()), K)
        places = torch.arange(len(source.test)).split(500)
        found = torch.cat([dknn.nonconformity(source.test.batch(p)) for p in places])
        # What is drawn below is what the classifier itself gives.
        first = dknn.calibrate(source.test.first(CALIBRATION))
        some = torch.arange(CALIBRATION, CALIBRATION + 200)
        own = found[:CALIBRATION].gather(1, source.test.labels[:CALIBRATION, None])[:, 0].sort().values
        inside = found[some] <= cutoffs(own, None, 10, 0.9)
        assert torch.equal(first.predict_set(source.test.batch(some), 0.9), inside)
        store.save_tensors(file, {"alpha": found})
    return store.load_tensors(file)["alpha"], source.test.labels


def draws(alpha: Tensor, y: Tensor, coverage: float, per_class: bool) -> dict[str, Any]:
    """What sets from many draws of calibration samples give on the rest."""
    n, m = CALIBRATION, len(y) - CALIBRATION
    place = math.ceil((n + 1) * Fraction(str(coverage)))
    least = stats.betabinom.ppf(0.005, m, place, n + 1 - place) / m
    covered, sizes, empty, single, worst = [], [], [], [], []
    for draw in range(DRAWS):
        order = rng.permutation(len(y), draw, "conformal")
        calm, rest = order[:n], order[n:]
        own = alpha[calm].gather(1, y[calm, None])[:, 0].sort()
        labels = y[calm][own.indices] if per_class else None
        inside = alpha[rest] <= cutoffs(own.values, labels, alpha.shape[1], coverage)
        held = inside.gather(1, y[rest, None])[:, 0].double()
        covered.append(float(held.mean()))
        size = inside.sum(1).double()
        sizes.append(float(size.mean()))
        empty.append(float((size == 0).double().mean()))
        single.append(float((size == 1).double().mean()))
        worst.append([float(held[y[rest] == c].mean()) for c in range(alpha.shape[1])])
    mean = torch.tensor(covered)
    return {
        "coverage": coverage,
        "per class": per_class,
        "covered": float(mean.mean()),
        "least of all draws": float(mean.min()),
        "0.5 % quantile": None if per_class else least,
        "draws below it": None if per_class else int((mean < least).sum()),
        "worst class": float(torch.tensor(worst).mean(0).min()),
        "mean size": float(torch.tensor(sizes).mean()),
        "empty": float(torch.tensor(empty).mean()),
        "of one class": float(torch.tensor(single).mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; exit status 1 where more draws fall below than may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.conformal")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--cifar", type=Path, required=True, help="the folder with CIFAR-10")
    parser.add_argument("--mnist-model", type=Path, required=True, help="a training run of mnist-cnn")
    parser.add_argument("--cifar-model", type=Path, required=True, help="resnet20-12fca82f.th")
    parser.add_argument("--work", type=Path, required=True, help="where α is kept")
    parser.add_argument("--per-class", type=int, help="first training images of each class; all by default")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {}
    print("| data | promised | covered | least of draws | below | worst class | mean size | one class | empty |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in ("mnist", "cifar10"):
        alpha, y = alphas(args, name)
        asked = [(c, False) for c in COVERAGES] + [(0.9, True), (0.95, True)]
        rows[name] = [draws(alpha, y, coverage, per_class) for coverage, per_class in asked]
        for r in rows[name]:
            shown = [100 * r[key] for key in ("covered", "least of all draws")]
            below = "" if r["draws below it"] is None else f"{r['draws below it']} of {DRAWS}"
            title = f"{name}{', per class' if r['per class'] else ''}"
            print(
                f"| {title} | {100 * r['coverage']:.0f} | {shown[0]:.2f} | {shown[1]:.2f} | {below} "
                f"| {100 * r['worst class']:.1f} | {r['mean size']:.3f} | {100 * r['of one class']:.1f} "
                f"| {100 * r['empty']:.1f} |",
                flush=True,
            )
    settings = {"k": K, "calibration": CALIBRATION, "draws": DRAWS, "references a class": args.per_class}
    kept.write_record(args.results, rows=rows, settings=settings)
    most = stats.binom.ppf(0.9999, DRAWS, 0.005)
    every = [r for found in rows.values() for r in found if not r["per class"]]
    return int(any(r["draws below it"] > most for r in every))


if __name__ == "__main__":
    sys.exit(main())
