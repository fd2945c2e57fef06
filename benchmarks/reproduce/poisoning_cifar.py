"""Poisoned references on CIFAR-10: `python -m benchmarks.reproduce.poisoning_cifar --help`.

The published ResNet-20, its 50,000 training images as references, cosine on the pooled features: how many of the first
test images are right whatever e references are modified, or inserted. Features are kept in the work folder. The network
was trained on these references; the guarantee takes it as fixed and trusted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet
from robustknn.certification import PoisoningInsert, PoisoningModify
from robustknn.datasets import load
from robustknn.evaluation.metrics import wilson
from robustknn.models import load_model
from robustknn.progress import Console

NEIGHBORS = (15, 75, 500, 5000)
CHANGES = (1, 5, 25, 100, 500, 1000)


def main(argv: Sequence[str] | None = None) -> int:
    """Certify, print a table in %, modified | inserted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.poisoning_cifar")
    parser.add_argument("--data", type=Path, required=True, help="the folder with CIFAR-10")
    parser.add_argument("--model", type=Path, required=True, help="resnet20-12fca82f.th")
    parser.add_argument("--work", type=Path, required=True, help="where the references are kept")
    parser.add_argument("-n", type=int, default=2000, help="test images, the first")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = load("cifar10", root=args.data, protocol="published")
    model = load_model("resnet20", args.model).eval()
    features = FeatureExtractor(model, [model.embedding_layer])
    where = args.work / "references"
    if where.exists():
        references = ReferenceSet.load(where, features)
    else:
        references = ReferenceSet.build(features, source.train, progress=Console())
        references.save(where)
    x, y = source.test.batch(torch.arange(args.n)), source.test.labels[: args.n]
    rows = {}
    print(f"| k (clean) | {' | '.join(f'e = {e}' for e in CHANGES)} | seconds, search | modify | insert |")
    print("|---|" + "---:|" * (len(CHANGES) + 3))
    for k in NEIGHBORS:
        knn = KNN(references, k, metric="cosine")
        began = time.perf_counter()
        knn.kneighbors(x)
        seconds, found = [time.perf_counter() - began], {}
        for certifier in (PoisoningModify(), PoisoningInsert()):
            began = time.perf_counter()
            certified = certifier(knn, x)
            seconds.append(time.perf_counter() - began)
            found[certifier.name] = certified.accuracy(y, CHANGES).tolist()
        right = int((certified.labels == y).sum())
        rows[k] = {
            "clean": right / len(y),
            "clean 95 %": wilson(right, len(y)),
            "e": CHANGES,
            **found,
            "seconds": seconds,
        }
        pairs = zip(found["poisoning-modify"], found["poisoning-insert"], strict=True)
        cells = [f"{100 * a:.1f} / {100 * b:.1f}" if b else "–" for a, b in pairs]
        print(
            f"| {k} ({100 * right / len(y):.1f}) | {' | '.join(cells)} | {' | '.join(f'{s:.1f}' for s in seconds)} |",
            flush=True,
        )
    kept.write_record(args.results, rows=rows, n=args.n, metric="cosine", layer=model.embedding_layer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
