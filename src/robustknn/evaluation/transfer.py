"""Transferability: examples made on one classifier, scored on others (as in AdvKNN, arXiv 1911.06591, Table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from robustknn.attacks import Attack
from robustknn.checks import check_inputs, check_positive_int
from robustknn.classifiers import Classifier, check_classifier
from robustknn.errors import InputError, brief
from robustknn.progress import Progress, Silent
from robustknn.threat import ThreatModel, check_threat


@dataclass(frozen=True)
class Transferability:
    """Accuracy of every classifier on the examples made on every other, and on the clean inputs.

    Attributes:
        sources: what the examples were made on, (S,) names; the first is "clean".
        targets: what they were scored on, (T,) names.
        accuracy: (S, T) share of the samples whose decision on the example is right. It is the bare decision: what is
            rejected is not right, and of tied classes the smallest number is taken.
        n: how many samples.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    accuracy: tuple[tuple[float, ...], ...]
    n: int

    def to_config(self) -> dict[str, Any]:
        """The matrix as JSON."""
        return {
            "sources": list(self.sources),
            "targets": list(self.targets),
            "accuracy": [list(row) for row in self.accuracy],
            "n": self.n,
        }

    def to_markdown(self) -> str:
        """A table: rows made on, columns scored on, accuracy in per cent."""
        lines = ["| made on | " + " | ".join(self.targets) + " |", "|---" * (len(self.targets) + 1) + "|"]
        for name, row in zip(self.sources, self.accuracy, strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")
        return "\n".join(lines)


def transferability(
    classifiers: Mapping[str, Classifier],
    x: Any,
    y: Any,
    attacks: Attack | Mapping[str, Attack],
    threat: ThreatModel,
    *,
    targets: Mapping[str, Classifier] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    progress: Progress | None = None,
) -> Transferability:
    """Attack every classifier and score the examples on all.

    Args:
        classifiers: what examples are made on, by name.
        x, y: the samples and their labels, as in `classifier.score`.
        attacks: one for all, or one by classifier's name.
        threat: norm, radius and bounds.
        targets: what they are scored on, by name; the classifiers themselves by default.

    Raises:
        InputError: no classifier, no attack for one, or one that cannot work on it, before any runs.
    """
    check_threat(threat)
    check_positive_int(batch_size, "batch_size")
    if not isinstance(classifiers, Mapping) or not classifiers:
        raise InputError("pass the classifiers by name: {'knn': …, 'dknn': …}.")
    scored = dict(classifiers if targets is None else targets)
    for name, classifier in {**classifiers, **scored}.items():
        check_classifier(classifier, f"classifier {name!r}")
    x = check_inputs(x, threat.bounds)
    chosen = {}
    for name, classifier in classifiers.items():
        attack = attacks.get(name) if isinstance(attacks, Mapping) else attacks
        if not isinstance(attack, Attack):
            raise InputError(f"the attack on {name!r} must be an Attack, not {brief(attack)}.")
        attack.check(classifier, classifier.place(x[:1]))
        chosen[name] = attack
    truth = {name: c.numbers(y, len(x)) for name, c in {**classifiers, **scored}.items()}
    threat.radii(x)  # refuses another number of radii than samples
    batches = torch.arange(len(x)).split(batch_size)
    progress = progress or Silent()
    progress.start("transferring", len(x) * len(classifiers))
    right = torch.zeros(len(classifiers) + 1, len(scored))
    try:
        for rows in batches:
            made = [x[rows]]
            for name, classifier in classifiers.items():
                placed = classifier.place(x[rows])
                labels, ids = truth[name][rows].to(placed.device), rows.to(placed.device)
                part = threat.select(rows)
                made.append(chosen[name].apply(classifier, placed, labels, part, None, ids, seed, batch_size).x_adv)
                progress.advance(len(rows))
            for column, (name, classifier) in enumerate(scored.items()):
                for row, examples in enumerate(made):
                    labels = classifier.labels(classifier.place(examples), rows.to(examples.device)).cpu()
                    right[row, column] += (labels == truth[name][rows].cpu()).sum()
    finally:
        progress.stop()
    accuracy = tuple(tuple(row) for row in (right / len(x)).tolist())
    return Transferability(("clean", *classifiers), tuple(scored), accuracy, len(x))
