"""The time of the worst case on MNIST: `python -m benchmarks.reproduce.worst_case --data DIR --model RUN --work DIR`.

DkNN, k = 75 by cosines, over every layer of the papers' CNN with all 60,000 references; `--references 20000 --layers
relu2 relu3` has the layers and references of the DkNN that other libraries attack in `python -m benchmarks.peers`. What
does not grow with the images (AdvKNN's heads, the coordinates of the references) is timed apart. Nothing else should
run beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kept
from robustknn import DkNN, FeatureExtractor, ReferenceSet, ThreatModel, rng
from robustknn.datasets import load
from robustknn.models import MnistCNN, load_model
from robustknn.objectives import AdvKNN
from robustknn.progress import Console
from robustknn.recipes import WorstCase
from robustknn.recipes.worst_case import STRENGTHS


def once(classifier: DkNN, x: Tensor, y: Tensor, threat: ThreatModel) -> float:
    """Seconds for what is made once: an image's search makes the coordinates, the objective its heads."""
    began = time.perf_counter()
    WorstCase("fast")(classifier, x[:1], y[:1], threat)
    for attack in WorstCase().members().values():
        objective = getattr(attack, "objective", None)
        if isinstance(objective, AdvKNN):
            objective.bind(classifier)
    return time.perf_counter() - began


def timed(classifier: DkNN, x: Tensor, y: Tensor, threat: ThreatModel, strength: str) -> dict[str, Any]:
    """A suite on the images."""
    began = time.perf_counter()
    result = WorstCase(strength)(classifier, x, y, threat)
    seconds = time.perf_counter() - began
    return {
        "strength": strength,
        "n": len(x),
        "accuracy": float(result.robust.double().mean()),
        "gradient passes": float(result.gradient_passes.double().mean()),
        "forward passes": float(result.forward_passes.double().mean()),
        "seconds": seconds,
        "minutes per 1,000": seconds / 60 / len(x) * 1000,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Time each suite, print a row; what is in the work folder is not timed again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.worst_case")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--model", type=Path, required=True, help="a training run of mnist-cnn")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--strengths", nargs="+", default=list(STRENGTHS), choices=STRENGTHS)
    parser.add_argument("--eps", type=float, default=0.1, help="L∞, pixels in [0, 1]")
    parser.add_argument("--layers", nargs="+", default=list(MnistCNN.feature_layers), choices=MnistCNN.feature_layers)
    parser.add_argument("--references", type=int, default=60_000, help="the first so many training images")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    source = load("mnist", root=args.data, protocol="published")
    features = FeatureExtractor(load_model("mnist-cnn", args.model).eval(), args.layers)
    references = ReferenceSet.build(features, source.train.first(args.references), progress=Console())
    classifier = DkNN(references, 75, metric="cosine")
    chosen = rng.permutation(len(source.test), 0, "worst-case-time")[: args.n].sort().values
    x, y = source.test.batch(chosen), source.test.labels[chosen]
    threat = ThreatModel("linf", args.eps)
    print("| suite | images | left | gradient, forward passes | seconds | minutes per 1,000 |", flush=True)
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    victim = f"{'-'.join(args.layers)} {args.references}"
    rows, start = [], f"worst-case {victim} linf {args.eps:g} n{args.n} t{args.threads}"
    preparing = once(classifier, x, y, threat)
    for strength in args.strengths:
        file = args.work / f"{start} {strength} {kept.digest(WorstCase(strength))}.json"
        row = kept.row(file, partial(timed, classifier, x, y, threat, strength))
        rows.append(row)
        passes = f"{row['gradient passes']:.0f}; {row['forward passes']:.0f}"
        share = f"{100 * row['accuracy']:.0f} %"
        cost = f"{row['seconds']:.0f} | {row['minutes per 1,000']:.1f}"
        print(f"| {strength} | {row['n']} | {share} | {passes} | {cost} |", flush=True)
    print(f"\nonce: {preparing:.0f} s")
    settings = {name: getattr(args, name) for name in ("layers", "references", "eps", "threads")}
    kept.write_record(args.results, **settings, once=preparing, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
