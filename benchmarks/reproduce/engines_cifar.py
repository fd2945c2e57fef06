"""What approximate search does to the retrieval defense: `python -m benchmarks.reproduce.engines_cifar --help`.

CIFAR-10, the published ResNet-20, its 50,000 training images as database (features of the last block before ReLU,
averaged over places, PCA to 64), K = 50, CBW-D. One evaluation for each engine: recall and agreement with exact search,
accuracy clean, under the transferred FGSM of the paper, and in the worst case, where attacks search exactly and what
stands is attacked through the engine. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import kept
from robustknn import ReferenceSet, RetrievalClassifier, ThreatModel, WorstCase, rng
from robustknn.attacks import Attack
from robustknn.classifiers import Classifier
from robustknn.datasets import load
from robustknn.evaluation import Options, evaluate, finish
from robustknn.evaluation.summary import ClassifierSummary
from robustknn.models import load_model
from robustknn.progress import Console
from robustknn.recipes import Published, web_scale_features

ENGINES = {
    "exact": "exact",
    "faiss": "faiss",
    "ivf-flat": "ivf-flat",
    "ivf-flat-1": "ivf-flat:nprobe=1",
    "ivf-sq8": "ivf-sq8",
    "ivf-pq": "ivf-pq",
    "ivf-pq-1": "ivf-pq:nprobe=1,rerank=1",
    "hnsw": "hnsw",
}
EPS = 1 / 255


def row(told: ClassifierSummary) -> dict[str, float]:
    """The figures of one engine, as shares."""
    beside, attacks = told.approximation, {a.name: a for a in told.attacks}
    worst = attacks["worst-case"]
    exact = worst.exact_search
    return {
        "recall@50": beside.recall if beside else 1.0,
        "decides alike": beside.vote_agreement if beside else 1.0,
        "clean": told.clean_accuracy,
        "published": attacks["published"].robust_accuracy,
        "worst case, exact search alone": exact.robust_accuracy if exact else worst.robust_accuracy,
        "worst case": worst.robust_accuracy,
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, in %."""
    columns = list(next(iter(rows.values())))
    lines = [f"| engine | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    lines += [f"| {name} | {' | '.join(f'{100 * v:.1f}' for v in found.values())} |" for name, found in rows.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, or go on, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.engines_cifar")
    parser.add_argument("--data", type=Path, required=True, help="the folder with CIFAR-10")
    parser.add_argument("--models", type=Path, required=True, help="the folder with the published weights")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, new or to be continued")
    parser.add_argument("-n", type=int, default=500, help="test images")
    parser.add_argument("--milvus", help="a Milvus uri: a server's, or a file for Milvus Lite")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = load("cifar10", root=args.data, protocol="published")
    model = load_model("resnet20", args.models / "resnet20-12fca82f.th").eval()
    features = web_scale_features(model, "conv_4_3", source.train, n_components=64)
    held = ReferenceSet.build(features, source.train, payload="softmax", labels="payload", progress=Console())
    specs = {**ENGINES, **({"milvus": f"milvus:uri={args.milvus}"} if args.milvus else {})}
    named: dict[str, Classifier] = {name: RetrievalClassifier(held, 50, index=spec) for name, spec in specs.items()}
    chosen = rng.permutation(len(source.test), 0, "engines")[: args.n].sort().values
    attacks: dict[str, Attack] = {"published": Published(), "worst-case": WorstCase("fast")}
    run = evaluate(
        named,
        source.test.subset(chosen),
        attacks=attacks,
        threat=ThreatModel("linf", EPS),
        out=args.out,
        options=Options(examples=0, controls=0),
        progress=Console(),
    )
    rows = {told.name: row(told) for told in finish(run).classifiers}
    kept.write_record(args.results, rows=rows, n=args.n, eps=EPS)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
