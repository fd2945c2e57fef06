"""What AdvKNN's plain attack depends on: `python -m benchmarks.reproduce.advknn_plain --data DIR --work DIR`.

FGSM and BIM at the settings of arXiv 1911.06591 are made on the network alone and judged by the kNN of its third layer
(k = 75, cosine, all training images of MNIST), as training goes on and over seeds of the training; no attack sees the
kNN, so what it loses is what transfers. The trained network's DkNN (all four layers) judges them too, by votes and by
p-values alone, as the paper counts. What is done is kept in the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import BIM, FGSM, KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, rng, store
from robustknn.attacks import Attack
from robustknn.classifiers import Network, decide
from robustknn.datasets import DataSource, load
from robustknn.evaluation.experiment import calibration_overlap
from robustknn.models import MnistCNN, load_model
from robustknn.objectives import CrossEntropy
from robustknn.progress import Console
from robustknn.training import EpochRecord, TrainConfig, initialise, train

Decide = Callable[[Tensor], Tensor]
SHOWN = (3, 6, 9, 12, 15, 18)
THREAT = ThreatModel("linf", 0.25)
ATTACKS: dict[str, Attack] = {
    "FGSM": FGSM(CrossEntropy()),
    "BIM": BIM(CrossEntropy(), steps=100, absolute_step=0.01),
}


def weights(work: Path, seed: int, epochs: int) -> Path:
    """Where the network of a stage is kept."""
    return work / f"mnist-cnn-{seed}-{epochs}.safetensors"


def train_seed(source: DataSource, work: Path, seed: int) -> None:
    """Train as `robustknn reproduce advknn-table2` does, and keep the stages."""
    model = initialise(MnistCNN, seed)

    def keep(record: EpochRecord) -> None:
        if record.epoch in SHOWN:
            store.save_tensors(weights(work, seed, record.epoch), dict(model.state_dict()))

    config = TrainConfig(epochs=max(SHOWN), seed=seed)
    train(model, source, config, work / f"mnist-cnn-{seed}", progress=Console(), on_epoch=keep)


def judged(network: nn.Module, source: DataSource, places: Tensor, deciders: Mapping[str, Decide]) -> dict[str, Any]:
    """Shares of right decisions, clean and on examples made on the network."""
    x, y, ids = source.test.batch(places), source.test.labels[places], source.test.ids[places]
    found: dict[str, Any] = {"n": len(y)}
    for name in ("clean", *ATTACKS):
        made = x if name == "clean" else made_on(network, x, y, ids, ATTACKS[name])
        found |= {
            f"{said}, {name}": float((labels(made).cpu() == y).double().mean()) for said, labels in deciders.items()
        }
    return found


def made_on(network: nn.Module, x: Tensor, y: Tensor, ids: Tensor, attack: Attack) -> Tensor:
    """Examples of an attack on the network alone."""
    return attack(Network(network, 10), x, y, THREAT, sample_ids=ids, batch_size=250).x_adv


def measured(network: nn.Module, source: DataSource, n: int) -> dict[str, Any]:
    """Of network and kNN."""
    features = FeatureExtractor(network, [MnistCNN.embedding_layer])
    knn = KNN(ReferenceSet.build(features, source.train, n_classes=10), 75, metric="cosine")
    victim = Network(network, 10)
    chosen = rng.permutation(len(source.test), 0, "plain")[:n].sort().values
    return judged(network, source, chosen, {"network": lambda v: victim.labels(victim.place(v)), "kNN": knn.labels})


def measured_on_dknn(network: nn.Module, source: DataSource, n: int) -> dict[str, Any]:
    """Of the DkNN, on test images that did not calibrate it."""
    references = ReferenceSet.build(FeatureExtractor(network, MnistCNN.feature_layers), source.train, n_classes=10)
    dknn = DkNN(references, 75, metric="cosine").calibrate(source.calibration)
    free = torch.ones(len(source.test), dtype=torch.bool)
    free[calibration_overlap(source, source.test)] = False
    chosen = free.nonzero()[:, 0][rng.permutation(int(free.sum()), 0, "plain")[:n].sort().values]
    return judged(network, source, chosen, {"DkNN": dknn.labels, "DkNN, p-values alone": lambda v: by_p(dknn, v)})


def by_p(dknn: DkNN, x: Tensor) -> Tensor:
    """The class of the largest p-value, of tied ones the smallest."""
    return torch.cat([decide(dknn.p_values(part)) for part in x.split(250)])


def main(argv: Sequence[str] | None = None) -> int:
    """Train each seed, measure its stages, print a row each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.advknn_plain")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--work", type=Path, required=True, help="where runs and finished rows are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-n", type=int, default=1000, help="test images")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = load("mnist", root=args.data, protocol="published")
    rows: list[dict[str, Any]] = []
    voted: list[dict[str, Any]] = []
    columns = [f"{c}, {a}" for c in ("network", "kNN") for a in ("clean", *ATTACKS)]
    print(f"| seed | epochs | {' | '.join(columns)} |\n|---:|---:|{'---:|' * len(columns)}", flush=True)
    for seed in args.seeds:
        train_seed(source, args.work, seed)
        for epochs in SHOWN:
            network = load_model("mnist-cnn", weights(args.work, seed, epochs)).eval()
            file = args.work / f"plain-{seed}-{epochs}-n{args.n}.json"
            row = kept.row(file, partial(measured, network, source, args.n))
            rows.append({"seed": seed, "epochs": epochs, **row})
            print(f"| {seed} | {epochs} | {' | '.join(f'{100 * row[c]:.1f}' for c in columns)} |", flush=True)
        row = kept.row(args.work / f"dknn-{seed}-n{args.n}.json", partial(measured_on_dknn, network, source, args.n))
        voted.append({"seed": seed, "epochs": epochs, **row})
    print("\n" + "\n".join(f"{name}: {value}" for row in voted for name, value in row.items()))
    kept.write_record(args.results, rows=rows, dknn=voted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
