"""Attempts to break certificates inside their radii: `python -m benchmarks.reproduce.soundness [--attempts 100000]`.

Every registered certifier meets every small victim that it accepts. An attempt is a move no longer than the certified
radius, of the input or of the features as the certificate's unit says: along the normal of a bisector, toward a
reference, at random, or the end of a climb by gradients; the hard decision judges. A violation is a defect. What is
certified under noise is judged by draws of other noise, and there a certificate may be wrong with probability .001.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import PGD
from robustknn.certification import Certified, Certifier, Smoothed, SmoothedEmbedding
from robustknn.certification.base import ABSTAINS
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.classifiers.rules import TIE
from robustknn.models import LipschitzCNN
from robustknn.training import initialise

LONGEST = 50.0
"""What an unlimited radius is tried up to."""


@dataclass(frozen=True)
class Victim:
    """A classifier over few references and inputs to certify."""

    name: str
    classifier: VoterClassifier
    x: Tensor


def victims(seed: int) -> Iterator[Victim]:
    """Raw and deep kNN and DkNN: k odd, even and all; 2 to 4 classes, some with few references; ties, duplicates."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for grid in (False, True):
        n, dim, classes, k = pick(8, 20, 40), pick(2, 3, 6), pick(2, 3, 4), pick(1, 1, 2, 3, 4, 5, 8)
        values = torch.rand(n + 10, dim, generator=generator, dtype=torch.float64)
        values = (3 * values).round() / 3 + 0.25 if grid else values
        labels = torch.randint(classes, (n,), generator=generator)
        labels[:classes] = torch.arange(classes)
        for metric in ("l2", "cosine"):
            references = ReferenceSet.from_vectors(
                values[:n].clone(), labels, features=FeatureExtractor(nn.Identity()), n_classes=classes
            )
            name = f"raw, {'grid, ' if grid else ''}{metric}"
            yield Victim(name, KNN(references, min(k, n), metric=metric), values[n:])
        yield Victim("raw, all vote", KNN(references, n, metric="cosine"), values[n:])
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()).double()
    x = torch.rand(60, 6, generator=generator, dtype=torch.float64)
    deep = ReferenceSet.build(FeatureExtractor(net, ["1", "3"]), (x[:50], torch.arange(50) % 2))
    yield Victim("DkNN of two layers", DkNN(deep, pick(1, 2, 3, 5)), x[50:])
    model = initialise(lambda: LipschitzCNN(image_size=8, width=4, embedding=8), seed)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    embedded = ReferenceSet.build(FeatureExtractor(model, ["embed"]), (images[:50], torch.arange(50) % 3))
    yield Victim("kNN over a 1-Lipschitz network", KNN(embedded, pick(1, 3, 4)), images[50:])


def directions(rows: Tensor, references: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(T, N, D): normals of bisectors, toward and away from references, random."""
    i, j = (torch.randint(len(references), (n, len(rows)), generator=generator) for _ in range(2))
    toward = references[i] - rows
    random = torch.randn(n, *rows.shape, generator=generator, dtype=rows.dtype)
    found = torch.cat([references[i] - references[j], toward, -toward, random])
    return found / found.norm(dim=2, keepdim=True).clamp_min(1e-300)


def by_features(victim: Victim, found: Certified, n: int, generator: torch.Generator) -> tuple[int, int]:
    """Attempts and successes of moves of every layer's features, each by the radius."""
    sure = found.radius > 0
    if not bool(sure.any()):
        return 0, 0
    classifier, labels = victim.classifier, found.labels[sure]
    features = classifier.read(victim.x[sure], [v.layer for v in classifier.voters])
    radius, votes, count = found.radius[sure].clamp_max(LONGEST)[:, None], [], 0
    for voter in classifier.voters:
        rows = features[voter.layer].detach().double()
        held = voter.references.rows(voter.layer, torch.arange(len(voter.references))).double()
        moved = rows + directions(rows, held, n, generator) * radius
        count = len(moved)
        votes.append(voter.votes(voter.index.search(moved.flatten(0, 1).to(features[voter.layer]), voter.n_neighbors)))
    lead = classifier.lead(classifier.combine(votes), labels.repeat(count))
    return len(lead), int((lead <= TIE).sum())


def by_inputs(victim: Victim, found: Certified, n: int, generator: torch.Generator) -> tuple[int, int]:
    """Attempts and successes of moves of the input by the radius, and of a climb by gradients inside it."""
    sure = found.radius > 0
    if not bool(sure.any()):
        return 0, 0
    moved, repeated = moved_by(victim, found, n, generator)
    lead = victim.classifier.lead(victim.classifier.scores(moved), repeated)
    x, labels, radius = victim.x[sure], found.labels[sure], found.radius[sure].clamp_max(LONGEST)
    climbed = PGD(steps=20)(victim.classifier, x, labels, ThreatModel("l2", radius, bounds=None))
    return len(lead) + len(x), int((lead <= TIE).sum()) + int((climbed.margin <= TIE).sum())


def moved_by(victim: Victim, found: Certified, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs moved by their radii (T·N, …), and what was certified of them (T·N,)."""
    sure = found.radius > 0
    x, radius = victim.x[sure], found.radius[sure].clamp_max(LONGEST)[:, None]
    flat = x.flatten(1).double()
    moves = directions(flat, victim.x.flatten(1).double(), n, generator) * radius
    moved = (flat + moves).to(x.dtype).flatten(0, 1).unflatten(1, x.shape[1:])
    return moved, found.labels[sure].repeat(len(moves))


def by_noise(
    victim: Victim, found: Certified, n: int, generator: torch.Generator, fresh: Classifier
) -> tuple[int, int]:
    """Attempts and successes of moves of the input by the radius, judged by the smoothed classifier with new draws."""
    if not bool((found.radius > 0).any()):
        return 0, 0
    moved, labels = moved_by(victim, found, n, generator)
    decided = fresh.labels(moved)
    return len(moved), int(((decided != labels) & (decided != ABSTAINS)).sum())


JUDGES = {"L2 of the features": by_features, "L2 of the input": by_inputs}
"""How a unit is attacked, by how it begins. What another certifier measures is tried by its own tests."""
NOISE: dict[str, Any] = {"sigma": 0.25, "n": 1000, "batch_size": 4096}
SMOOTHED: dict[str, Callable[..., Classifier]] = {
    "smoothing": Smoothed,
    "smoothed-embedding": SmoothedEmbedding,
}


def attempt(certifier: Certifier, victim: Victim, n: int, seed: int) -> tuple[int, int] | None:
    """Attempts and successes against one victim; None where the certificate does not hold or is of another kind."""
    judge = next((judge for begins, judge in JUDGES.items() if certifier.unit.startswith(begins)), None)
    if judge is None:
        return None
    try:
        certifier.check(victim.classifier)
    except InputError:
        return None
    found = certifier(victim.classifier, victim.x)
    if certifier.name in SMOOTHED:
        fresh = SMOOTHED[certifier.name](victim.classifier, **NOISE, seed=seed + 1)
        return by_noise(victim, found, max(1, n // 4), torch.Generator().manual_seed(seed), fresh)
    return judge(victim, found, n, torch.Generator().manual_seed(seed))


def run(attempts: int, seed: int, per_kind: int = 12) -> tuple[Counter[str], Counter[str]]:
    """Attempts and violations by certifier and victim, until there are as many attempts in all."""
    tried: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    certifiers = [entry.build(**(NOISE if entry.name in SMOOTHED else {})) for entry in registry.certifiers]
    while tried.total() < attempts:
        for victim in victims(seed):
            for certifier in certifiers:
                found = attempt(certifier, victim, per_kind, seed)
                if found is not None:
                    name = f"{certifier.name}: {victim.name}"
                    tried[name] += found[0]
                    broken[name] += found[1]
        seed += 1
    return tried, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Print attempts and violations; the exit status is 1 where there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.soundness")
    parser.add_argument("--attempts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tried, broken = run(args.attempts, args.seed)
    for name in sorted(tried):
        print(f"{name}: {broken[name]} violations in {tried[name]} attempts", flush=True)
    print(f"all: {broken.total()} violations in {tried.total()} attempts")
    kept.write_record(args.results, attempts=dict(tried), violations=dict(broken), seed=args.seed)
    return int(broken.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
