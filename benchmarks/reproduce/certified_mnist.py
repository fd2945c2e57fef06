"""kNN on raw MNIST, both sides: `python -m benchmarks.reproduce.certified_mnist --work DIR [--results FILE]`.

60,000 references, L2 of pixels in [0, 1]. Finished rows are kept in the work folder. Needs ROBUSTKNN_DATA.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kept
from robustknn import KNN, ThreatModel
from robustknn.attacks import MinimumNorm
from robustknn.certification import Certified, InputCertificate
from robustknn.datasets import load

RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.58, 2.0, 2.5)
CASES = {
    "1-NN": (1, InputCertificate()),
    "1-NN, pixels stay in [0, 1]": (1, InputCertificate(bounds=(0.0, 1.0))),
    "5-NN": (5, InputCertificate(upper="programs", pivots=20)),
}


def certified(k: int, certifier: InputCertificate, knn: KNN, x: Tensor) -> dict[str, Any]:
    """Both sides of every sample, as lists, and the seconds of processor time that a sample took."""
    began = time.process_time()
    found: Certified = certifier(knn, x)
    spent = (time.process_time() - began) / len(x)
    assert found.upper is not None
    sides = {"labels": found.labels.tolist(), "radius": found.radius.tolist(), "upper": found.upper.tolist()}
    return {**sides, "seconds": spent}


def attacked(knn: KNN, x: Tensor, y: Tensor, seed: int) -> list[float]:
    """The least move that our attack finds for every sample, within [0, 1]; 0 where it is wrong already."""
    threat = ThreatModel("l2", 10.0)
    found = MinimumNorm(steps=40, targets=3)(knn, x, y, threat, seed=seed)
    return torch.where(found.success, found.l2.double(), torch.inf).tolist()


def summary(row: dict[str, Any], attack: list[float], y: Tensor) -> dict[str, Any]:
    """Shares at every radius, and by how much the two sides differ."""
    right = torch.tensor(row["labels"]) == y
    radius, upper, least = (torch.tensor(v, dtype=torch.float64) for v in (row["radius"], row["upper"], attack))
    curves = {
        "certified": [float((right & (radius >= r)).double().mean()) for r in RADII],
        "broken by a move found beside it": [float((right & (upper > r)).double().mean()) for r in RADII],
        "attacked": [float((right & (least > r)).double().mean()) for r in RADII],
    }
    sure = right & (radius > 0)
    ratios = {"upper": (upper / radius)[sure], "attack": (least / radius)[sure]}
    return {
        "clean": float(right.double().mean()),
        "seconds a sample": row["seconds"],
        "curves": curves,
        "violations": int((least < radius)[right].sum() + (upper < radius)[right].sum()),
        "ratio to the radius": {k: {"median": float(v.median()), "largest": float(v.max())} for k, v in ratios.items()},
        "gap 0 (1e-5)": float((ratios["upper"] < 1 + 1e-5).double().mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.certified_mnist")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--samples", type=int, default=200, help="the first test images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = load("mnist", protocol="published")
    train, test = (split.batch(torch.arange(len(split))).flatten(1) for split in (source.train, source.test))
    x, y = test[: args.samples], source.test.labels[: args.samples]
    rows: dict[str, Any] = {}
    for name, (k, certifier) in CASES.items():
        knn = KNN(None, k).fit(train, source.train.labels)
        place = list(CASES).index(name)

        def row(kind: str, measure: Callable[[], Any], place: int = place) -> Any:
            return kept.row(args.work / f"mnist-{kind}-{place}-{args.samples}-{args.seed}.json", measure)

        sides = row("certified", partial(certified, k, certifier, knn, x))
        # The same attack for both 1-NN rows: it never leaves the box, so it bounds either from above.
        found = row(f"attacked-{k}", partial(attacked, knn, x, y, args.seed), place=0)
        rows[name] = summary(sides, found, y)
        print(name, rows[name], flush=True)
    settings = {"radii": RADII, "samples": args.samples, "seed": args.seed, "references": len(train)}
    kept.write_record(args.results, rows=rows, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
