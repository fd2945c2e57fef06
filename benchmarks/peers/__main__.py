"""`python -m benchmarks.peers --work DIR [--data DIR]`, in an environment of its own.

`make test-peers` makes that environment, .venv-peers, and tests our faces for these libraries in it.

Every library attacks every view of the same classifier: the network alone ("network"), the stock soft vote
(classes' shares of softmax(−distance / .5) over the k nearest, "stock"), and our `surrogate`; black-box attacks see
`as_hard`. What counts is the hard decision of the classifier itself on the examples, after they are projected into
the ball, by the rule that our own attacks are judged by.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import KNN, PGD, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, rng
from robustknn.adapters import as_hard, surrogate
from robustknn.attacks import Attack
from robustknn.classifiers import TIE, VoterClassifier
from robustknn.datasets import load
from robustknn.models import DigitsCNN, MnistCNN
from robustknn.recipes import WorstCase
from robustknn.training import TrainConfig, initialise, train

STEPS, SQUARE_QUERIES, BOUNDARY_IMAGES = 100, 500, 20


@dataclass(frozen=True)
class Scene:
    """A victim, images and a threat."""

    name: str
    classifier: VoterClassifier
    x: Tensor
    y: Tensor
    threat: ThreatModel

    @property
    def eps(self) -> float:
        return float(self.threat.eps)


class Counted(nn.Module):
    """A view that counts the images it was shown."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images = inner, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        scores: Tensor = self.inner(x)
        return scores


class Stock(nn.Module):
    """The soft vote that one writes first: log of the summed softmax of −distance / .5 over the k nearest."""

    def __init__(self, classifier: VoterClassifier) -> None:
        super().__init__()
        self._held = (classifier,)

    def forward(self, x: Tensor) -> Tensor:
        (classifier,) = self._held
        with torch.no_grad():
            look = classifier.look(x)
        features = classifier.read(x, [v.layer for v in classifier.voters])
        total: Tensor | float = 0.0
        for voter in classifier.voters:
            near = look.nearest[voter].first(voter.n_neighbors)
            rows, z = voter.index.reconstruct(near.ids).to(x), features[voter.layer]
            if voter.metric == "cosine":
                rows, z = nn.functional.normalize(rows, dim=2), nn.functional.normalize(z, dim=1)
            shares = torch.softmax(-(rows - z[:, None]).norm(dim=2) / 0.5, 1)
            votes = shares.new_zeros(len(x), classifier.n_classes)
            total = total + votes.scatter_add(1, voter.labels_of(near.ids), shares)
        assert isinstance(total, Tensor)
        return (total / len(classifier.voters)).clamp_min(1e-12).log()


def torchattacks_pgd(view: nn.Module, scene: Scene) -> Tensor:
    import torchattacks

    return torchattacks.PGD(view, eps=scene.eps, alpha=2.5 * scene.eps / STEPS, steps=STEPS)(scene.x, scene.y)


def torchattacks_apgd(view: nn.Module, scene: Scene, loss: str) -> Tensor:
    import torchattacks

    return torchattacks.APGD(view, eps=scene.eps, steps=STEPS, loss=loss)(scene.x, scene.y)


def foolbox_pgd(view: nn.Module, scene: Scene) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(view, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=2.5 / STEPS)
    return attack(model, scene.x, scene.y, epsilons=scene.eps)[1]


def art_estimator(view: nn.Module, scene: Scene) -> Any:
    from art.estimators.classification import PyTorchClassifier

    shape, classes = tuple(scene.x.shape[1:]), scene.classifier.n_classes
    return PyTorchClassifier(view, nn.CrossEntropyLoss(), shape, classes, clip_values=(0.0, 1.0), device_type="cpu")


def art_pgd(view: nn.Module, scene: Scene) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent

    attack = ProjectedGradientDescent(
        art_estimator(view, scene),
        eps=scene.eps,
        eps_step=2.5 * scene.eps / STEPS,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=100,
        verbose=False,
    )
    return torch.from_numpy(attack.generate(scene.x.numpy(), scene.y.numpy()))


def autoattack(view: nn.Module, scene: Scene, name: str) -> Tensor:
    from pyautoattack import AutoAttack

    attack = AutoAttack(view, norm="Linf", eps=scene.eps, version="custom", attacks=[name], seed=0)
    attack.verbose = False
    if name == "square":
        attack.square.n_queries = SQUARE_QUERIES
    examples = attack.run_standard_evaluation(scene.x, scene.y, batch_size=100)
    return examples[0] if isinstance(examples, tuple) else examples


def art_hop_skip_jump(view: nn.Module, scene: Scene) -> Tensor:
    from art.attacks.evasion import HopSkipJump

    few = scene.x[:BOUNDARY_IMAGES].numpy()
    attack = HopSkipJump(art_estimator(view, scene), norm="inf", max_iter=20, max_eval=500, init_eval=20, verbose=False)
    return torch.from_numpy(attack.generate(few, scene.y[:BOUNDARY_IMAGES].numpy()))


WHITE_BOX: dict[str, Callable[[nn.Module, Scene], Tensor]] = {
    "foolbox LinfPGD": foolbox_pgd,
    "torchattacks PGD": torchattacks_pgd,
    "ART PGD": art_pgd,
    "torchattacks APGD-CE": lambda view, scene: torchattacks_apgd(view, scene, "ce"),
    "pyautoattack APGD-CE": lambda view, scene: autoattack(view, scene, "apgd-ce"),
    "pyautoattack APGD-DLR": lambda view, scene: autoattack(view, scene, "apgd-dlr"),
}
BLACK_BOX: dict[str, Callable[[nn.Module, Scene], Tensor]] = {
    "pyautoattack Square": lambda view, scene: autoattack(view, scene, "square"),
    "ART HopSkipJump": art_hop_skip_jump,
}


def judge(scene: Scene, x_adv: Tensor) -> tuple[float, int]:
    """Accuracy left on the examples by our rule, after projecting them into the ball, and how many there were."""
    n = len(x_adv)
    x, y = scene.x[:n], scene.y[:n]
    moved = scene.threat.project(x_adv.to(x), x)
    clean = scene.classifier.labels(x) == y
    fooled = scene.classifier.lead(scene.classifier.scores(moved), y) < -TIE
    return float((clean & ~fooled).double().mean()), n


def measure(scene: Scene, name: str, view: str, run: Callable[[], tuple[float, int, float]]) -> dict[str, Any]:
    """A row: accuracy left, of how many images, and passes for each; a library that cannot is a row too."""
    began = time.perf_counter()
    try:
        accuracy, n, passes = run()
    except Exception as error:
        print(f"{scene.name} | {name} | {view} | failed: {type(error).__name__}: {error}"[:200], flush=True)
        return {"attack": name, "view": view, "error": f"{type(error).__name__}: {error}"[:200]}
    seconds = time.perf_counter() - began
    print(f"{scene.name} | {name} | {view} | {100 * accuracy:.1f} | {seconds:.1f} | {passes:.0f}", flush=True)
    return {"attack": name, "view": view, "accuracy": accuracy, "n": n, "seconds": seconds, "passes": passes}


def peer(scene: Scene, attack: Callable[[nn.Module, Scene], Tensor], module: nn.Module) -> tuple[float, int, float]:
    """A library's attack on a view."""
    counted = Counted(module)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        x_adv = attack(counted, scene)
    accuracy, n = judge(scene, x_adv.detach())
    return accuracy, n, counted.images / n


def ours(scene: Scene, attack: Attack) -> tuple[float, int, float]:
    """An attack of this library."""
    result = attack(scene.classifier, scene.x, scene.y, scene.threat)
    passes = float((result.gradient_passes + result.forward_passes).double().mean())
    return float(result.robust.double().mean()), len(scene.x), passes


def rows_of(scene: Scene, work: Path) -> list[dict[str, Any]]:
    """Ours, and every peer on every view unless ours leave nothing; what is done is kept, run by run."""
    model = scene.classifier.extractor.model  # type: ignore[union-attr]
    views = {"network": model, "stock": Stock(scene.classifier), "surrogate": surrogate(scene.classifier)}
    white = [
        (name, view, partial(peer, scene, f, module)) for view, module in views.items() for name, f in WHITE_BOX.items()
    ]
    black = [(name, "hard scores", partial(peer, scene, f, as_hard(scene.classifier))) for name, f in BLACK_BOX.items()]
    attacks: dict[str, Attack] = {"ours: ask": PGD(), "ours: worst-case": WorstCase()}
    own = [(name, "all", partial(ours, scene, attack)) for name, attack in attacks.items()]

    def row(name: str, view: str, run: Callable[[], tuple[float, int, float]]) -> dict[str, Any]:
        said = f"{name.replace(': ', ' ')} {kept.digest(attacks[name])}" if name in attacks else name
        file = work / f"peers {scene.name} n{len(scene.x)} {said} {view}.json"
        found: dict[str, Any] = kept.row(file, partial(measure, scene, name, view, run))
        return found

    rows = [row(*each) for each in own]
    if any(found.get("accuracy") == 0 for found in rows):
        return rows  # nothing can leave less than nothing
    return rows + [row(*each) for each in [*white, *black]]


def scenes(args: argparse.Namespace) -> list[Scene]:
    """The digits victim, and MNIST's kNN and DkNN at three radii."""
    made = []
    for data in args.victims:
        small = data == "digits"
        source = load(data, root=None if small else args.data, protocol="published")
        model = initialise(DigitsCNN if small else MnistCNN, 0)
        config = TrainConfig(epochs=25, batch_size=64, lr=2e-3) if small else TrainConfig(epochs=3)
        kept.network(args.work / f"{data}-0.safetensors", model, partial(train, model, source, config))
        train_set = source.train.first(min(20_000, len(source.train)))
        layers = type(model).feature_layers
        references = ReferenceSet.build(FeatureExtractor(model, layers), train_set)
        knn = KNN(references, 15, layer=type(model).embedding_layer)
        victims: dict[str, VoterClassifier] = {"15-NN": knn}
        if not small:
            # The last two convolutions: the first one's 12,544 features would make the black-box rows take days.
            victims["DkNN, 2 layers, k = 75"] = DkNN(references, 75, metric="cosine", layers=layers[1:3])
            # Six times fewer numbers than those: 200 images in an hour a radius.
            victims["DkNN, last layers, k = 75"] = DkNN(references, 75, metric="cosine", layers=layers[2:])
        chosen = rng.permutation(len(source.test), 0, "peers")[: args.n].sort().values
        x, y = source.test.batch(chosen), source.test.labels[chosen]
        for name, classifier in victims.items():
            for eps in (0.15,) if small else (0.1, 0.2, 0.25):
                made.append(Scene(f"{data} {name} {eps:g}", classifier, x, y, ThreatModel("linf", eps)))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no result in the work folder yet; print each, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--data", type=Path, help="the folder with MNIST")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished runs are kept")
    parser.add_argument("--victims", nargs="*", default=["digits", "mnist"])
    parser.add_argument("--only", default="", help="the scenes whose name has this in it")
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--results", type=Path, help="where to write peers.json")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    everything = {}
    for scene in scenes(args):
        if args.only in scene.name:
            everything[scene.name] = rows_of(scene, args.work)
    kept.write_record(args.results, scenes=everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
