"""Retrieval on CIFAR-10, the web-scale defense in small: `python -m benchmarks.reproduce.retrieval_cifar --help`.

"seen": the published ResNet-20, its 50,000 training images as database (as ImageNet's were in arXiv 1903.01612), a
ResNet-32 as the stranger. "unseen": two ResNet-20 trained on the first 25,000 images; the database is of the
others, 1,000 up to all ("targeted"), and all with 25,000 images of no class (Fashion-MNIST) among them. Features:
pre-ReLU output of the last block, averaged over places, PCA; no labels. L2 radius: a share of each image's own
norm. Examples of the stranger (black-box) and of the network (gray-box), one step and 20; and of the very
classifier (white). Nothing is chosen here. Networks, examples and finished rows are kept in the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import PGD, Adaptive, CrossEntropy, ReferenceSet, RetrievalClassifier, ThreatModel, registry, rng, store
from robustknn.classifiers import Classifier, Network
from robustknn.datasets import Split, load
from robustknn.models import load_model
from robustknn.models.resnet import resnet20
from robustknn.recipes import web_scale_features
from robustknn.training import TrainConfig, initialise, train

SHARES = (0.005, 0.01, 0.02, 0.04, 0.06)
LAYER, K = "conv_4_3", 50
LAYERS = ("conv_2_3", "conv_3_3", LAYER, "avgpool")
NEIGHBORS = (1, 5, 10, 25, 50, 100)
WEIGHTINGS = ("UW", "CBW-E", "CBW-D")
SIZES = (1_000, 5_000, 25_000)
WHITE = (0.005, 0.01)
COLUMNS = ("black FGSM", "black PGD", "gray FGSM", "gray PGD", "white")
CONFIG = TrainConfig(
    epochs=20,
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
    schedule="one-cycle",
    augment=True,
    precision="bf16",
    channels_last=True,
)


@dataclass
class Part:
    """What is trained on, without validation: nothing is selected."""

    train: Split
    validation: None = None


def networks(args: argparse.Namespace, scene: str) -> tuple[nn.Module, nn.Module]:
    """The defended network and a stranger's."""
    if scene == "seen":
        names = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
        defended, stranger = (load_model(k, args.models / v).eval() for k, v in names.items())
        return defended, stranger
    half = load("cifar10", root=args.data, protocol="published").train.first(25_000)
    made = []
    for seed in (0, 1):
        model = initialise(resnet20, seed)
        train(model, Part(half), TrainConfig(**{**CONFIG.__dict__, "seed": seed}), args.work / f"half-{seed}")
        made.append(model.eval())
    return made[0], made[1]


class Bench:
    """One scene: networks, test images, their examples and databases."""

    def __init__(self, args: argparse.Namespace, scene: str) -> None:
        self.args, self.scene = args, scene
        source = load("cifar10", root=args.data, protocol="published")
        self.model, self.stranger = networks(args, scene)
        chosen = rng.permutation(len(source.test), 0, "retrieval")[: args.n].sort().values
        self.ids, self.x, self.y = chosen, source.test.batch(chosen), source.test.labels[chosen]
        every = torch.arange(len(source.train))
        self.database = source.train if scene == "seen" else source.train.subset(every[25_000:])
        self._held: dict[Any, ReferenceSet] = {}

    def threat(self, share: float) -> ThreatModel:
        """The ball of each image, (n,) radii."""
        return ThreatModel("l2", share * self.x.flatten(1).norm(dim=1))

    def examples(self, share: float) -> dict[str, Tensor]:
        """Examples of the stranger and of the network, of one step and of 20."""
        file = self.args.work / f"{self.scene}-examples-{share:g}-n{len(self.y)}.safetensors"
        if not file.exists():
            attacks = {"FGSM": registry.attacks.create("fgsm-transfer"), "PGD": PGD(CrossEntropy(), steps=20)}
            found = {}
            for who, model in (("black", self.stranger), ("gray", self.model)):
                for name, attack in attacks.items():
                    result = attack(Network(model, 10), self.x, self.y, self.threat(share), sample_ids=self.ids)
                    found[f"{who} {name}"] = result.x_adv
            store.save_tensors(file, found)
        return store.load_tensors(file)

    def references(self, size: int | None = None, layer: str = LAYER, distractors: bool = False) -> ReferenceSet:
        """A database without labels, and the features fitted on it."""
        key = size, layer, distractors
        if key not in self._held:
            split: Any = self.database if size is None else self.database.first(size)
            features = web_scale_features(self.model, layer, split, n_components=None)
            width = next(iter(features(self.x[:16]).values())).shape[1]
            features = web_scale_features(self.model, layer, split, n_components=min(64, width))
            data = (split.batch(torch.arange(len(split))), split.labels)
            if distractors:
                data = (torch.cat([data[0], off_class(self.args, 25_000)]), torch.zeros(len(split) + 25_000).long())
            self._held = {key: ReferenceSet.build(features, data, payload="softmax", labels="payload")}
        return self._held[key]

    def retrieval(
        self, k: int = K, weighting: str = "CBW-D", size: int | None = None, layer: str = LAYER, off: bool = False
    ) -> RetrievalClassifier:
        """The defense."""
        return RetrievalClassifier(self.references(size, layer, off), k, weighting=weighting)


def off_class(args: argparse.Namespace, n: int) -> Tensor:
    """Images of no class of CIFAR-10, (n, 3, 32, 32)."""
    gray = load("fashion-mnist", root=args.more).train.first(n)
    padded = nn.functional.pad(gray.batch(torch.arange(n)), (2, 2, 2, 2))
    return padded.expand(-1, 3, -1, -1).contiguous()


def rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Classifier], bool]]:
    """What is measured: name, classifier, whether it is attacked itself."""
    yield "network", lambda: Network(bench.model, 10), True
    for weighting in WEIGHTINGS:
        yield f"{weighting}, K = {K}", partial(bench.retrieval, weighting=weighting), True
    for k in NEIGHBORS:
        if k != K:
            yield f"CBW-D, K = {k}", partial(bench.retrieval, k), k == 1
    if bench.scene == "unseen":
        for size in SIZES[:-1]:
            yield f"CBW-D, K = {K}, {size:,} images", partial(bench.retrieval, size=size), False
        yield f"CBW-D, K = {K}, 25,000 images and 25,000 of no class", partial(bench.retrieval, off=True), True
    for layer in LAYERS:
        if layer != LAYER:
            yield f"CBW-D, K = {K}, {layer}", partial(bench.retrieval, layer=layer), False


def measure(bench: Bench, name: str, make: Callable[[], Classifier], white: bool) -> dict[str, Any]:
    """Shares of the test images that stay right: clean, and by share of the norm."""
    classifier = make()

    def right(x: Tensor) -> float:
        found = torch.cat([classifier.labels(part) for part in x.split(200)])
        return float((found == bench.y).double().mean())

    row: dict[str, Any] = {"n": len(bench.y), "clean": right(bench.x)}
    for share in SHARES:
        row[f"{share:g}"] = {name: right(x) for name, x in bench.examples(share).items()}
    attack = PGD(CrossEntropy() if isinstance(classifier, Network) else Adaptive())
    few = slice(bench.args.white)
    for share in WHITE if white else ():
        threat = ThreatModel("l2", share * bench.x[few].flatten(1).norm(dim=1))
        result = attack(classifier, bench.x[few], bench.y[few], threat, sample_ids=bench.ids[few])
        row[f"{share:g}"]["white"] = float(result.robust.double().mean())
    print(bench.scene, name, row, file=sys.stderr, flush=True)
    return row


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, in %: by share of the norm."""
    lines = [f"| | clean | {' | '.join(COLUMNS)} |", "|---|---:|" + "---:|" * len(COLUMNS)]
    for name, row in found.items():
        cells = []
        for column in COLUMNS:
            values = [row[f"{s:g}"].get(column) for s in SHARES]
            shown = ["·" if v is None else f"{100 * v:.0f}" for v in values]
            cells.append(" ".join(shown) if set(shown) != {"·"} else "")
        lines.append(f"| {name} | {100 * row['clean']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing in the work folder, and print the tables of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.retrieval_cifar")
    parser.add_argument("--data", type=Path, required=True, help="the folder with CIFAR-10")
    parser.add_argument("--more", type=Path, required=True, help="the folder with Fashion-MNIST")
    parser.add_argument("--models", type=Path, required=True, help="the folder with the published weights")
    parser.add_argument("--work", type=Path, required=True, help="where networks, examples and rows are kept")
    parser.add_argument("-n", type=int, default=1000, help="test images")
    parser.add_argument("--white", type=int, default=300, help="of these, for the attack on the very classifier")
    parser.add_argument("--scenes", nargs="+", default=["seen", "unseen"])
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    every = {}
    for scene in args.scenes:
        bench, found = Bench(args, scene), {}
        for place, (name, make, white) in enumerate(rows(bench)):
            file = args.work / f"{scene}-{place:02d}-n{args.n}.json"
            found[name] = kept.row(file, partial(measure, bench, name, make, white))
        every[scene] = found
    for scene, found in every.items():
        print(f"{scene}; shares of the norm {', '.join(f'{s:g}' for s in SHARES)}\n\n{table(found)}\n")
    kept.write_record(args.results, rows=every, shares=SHARES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
