"""What an evaluation is given, refused or brought into one form before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks import Attack
from robustknn.checks import (
    as_tensor,
    check_inputs,
    check_labels,
    check_positions,
    check_positive_int,
    check_whole,
    class_numbers,
)
from robustknn.classifiers import Classifier, check_classifier, named_classes
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.errors import InputError, brief, unknown_name
from robustknn.evaluation.rundir import CLEAN, check_name
from robustknn.threat import ThreatModel


@dataclass(frozen=True)
class Options:
    """What an evaluation does beside attacking.

    Args:
        seed: of all randomness.
        batch_size: samples worked on at once, and rows in a file; it changes memory and time, not results.
        examples: how many samples (the first) keep their adversarial example and neighbors, for the report.
        controls: on how many samples (the first) the controls for gradient masking run; 0 leaves them out.
        approximation: on how many samples (the first) a classifier whose index is not exact is compared with its exact
            twin: recall of the neighbors, agreement of the decisions.
    """

    seed: int = 0
    batch_size: int = 100
    examples: int = 24
    controls: int = 100
    approximation: int = 1000


def checked_options(options: Options) -> Options:
    if not isinstance(options, Options):
        raise InputError(f"options must be Options(seed=…, batch_size=…), not {brief(options)}.")
    check_whole(options.seed, "seed")
    check_positive_int(options.batch_size, "batch_size")
    check_whole(options.examples, "examples", 0)
    check_whole(options.controls, "controls", 0)
    check_positive_int(options.approximation, "approximation")
    return options


def named_classifiers(classifiers: Classifier | Mapping[str, Classifier]) -> dict[str, Classifier]:
    if isinstance(classifiers, (list, tuple, set)):
        raise InputError("several classifiers are passed by name: {'knn': …, 'dknn': …}.")
    if not isinstance(classifiers, Mapping):
        return {"knn": check_classifier(classifiers)}
    if not classifiers:
        raise InputError("there is no classifier to evaluate; pass at least one.")
    return {name: check_classifier(c, f"classifier {name!r}") for name, c in classifiers.items()}


def common_classes(named: Mapping[str, Classifier]) -> np.ndarray[Any, Any] | None:
    """What the classifiers call their classes, None for the class numbers; InputError when they do not agree."""
    every = {name: named_classes(c) for name, c in named.items()}
    (first, classes), *others = every.items()
    for name, other in others:
        if (None if other is None else other.tolist()) != (None if classes is None else classes.tolist()):
            raise InputError(
                f"the classifiers {first!r} and {name!r} were fitted on other labels, so that y cannot mean the same "
                "to both; evaluate each in a run of its own."
            )
    return classes


def as_samples(data: Split | tuple[Any, Any], classes: np.ndarray[Any, Any] | None) -> Split:
    """The samples with class numbers for labels."""
    if isinstance(data, Split):
        split = data
        if classes is not None:
            split = copy.copy(data)
            split.labels = torch.from_numpy(class_numbers(data.labels, classes))
        return split
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(f"data must be a Split or a pair (x, y), not {type(data).__name__}.")
    x, y = check_inputs(data[0]), data[1]
    numbers = check_labels(y if classes is None else class_numbers(y, classes), len(x), None)
    return Split(x.detach().cpu(), numbers, "test")


def excluded_positions(exclude: Mapping[str, Any], named: Mapping[str, Classifier], n: int) -> dict[str, Tensor]:
    if not isinstance(exclude, Mapping):
        raise InputError(f"exclude gives positions by classifier, {{'knn': [0, 1]}}, not {brief(exclude)}.")
    for name in exclude:
        if name not in named:
            raise unknown_name("classifier in exclude:", name, named)
    return {name: check_positions(value, n, f" in exclude[{name!r}]") for name, value in exclude.items()}


def radii_of(eps: Any, threat: ThreatModel) -> list[float]:
    given = as_tensor(eps, "eps")
    return [float(threat.with_eps(e).eps) for e in given.reshape(-1).tolist()]


def named_attacks(attacks: str | Sequence[str | Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:
        given = [attacks] if isinstance(attacks, str) else list(attacks) if isinstance(attacks, Iterable) else [None]
        if not all(isinstance(attack, (str, Attack)) for attack in given):
            raise InputError(
                f"attacks must be a name, a list of names, or {{name: attack}}, not {brief(attacks)}; "
                "robustknn list attacks shows the names."
            )
        named = {}
        for attack in given:
            name = attack if isinstance(attack, str) else str(to_config(attack, registry.attacks)["name"])
            if name in named:
                raise InputError(f"two attacks are named {name!r}; pass them by name: {{'a': …, 'b': …}}.")
            named[name] = registry.attacks.create(attack) if isinstance(attack, str) else attack
    for name, attack in named.items():
        if check_name(name, "attack") == CLEAN or not isinstance(attack, Attack):
            raise InputError(f"attack {name!r} must be an Attack under another name than 'clean'.")
    return named
