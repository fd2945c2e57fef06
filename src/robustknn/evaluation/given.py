"""What an evaluation is given, checked and described: classifiers by name, samples, who is left out, hashes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import Bounds, check_inputs, check_labels, check_positions, class_numbers
from robustknn.classifiers import Classifier, DkNN, VoterClassifier, check_classifier, named_classes
from robustknn.classifiers.voters import Voter
from robustknn.code_version import code_fingerprint
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.errors import InputError, brief, unknown_name
from robustknn.evaluation.approximation import settings_of
from robustknn.evaluation.rundir import check_name
from robustknn.reference import ReferenceSet

REJECTED_SHARES = (0.01, 0.05, 0.1)
"""Shares of the calibration samples by which thresholds on credibility are set for the summary."""


def classifiers_by_name(classifiers: Classifier | Mapping[str, Classifier]) -> dict[str, Classifier]:
    """One classifier, or several by name, as a dictionary; InputError for anything else."""
    if isinstance(classifiers, (list, tuple, set)):
        raise InputError("several classifiers are passed by name: {'knn': …, 'dknn': …}.")
    if not isinstance(classifiers, Mapping):
        return {"knn": check_classifier(classifiers)}
    if not classifiers:
        raise InputError("there is no classifier to evaluate; pass at least one.")
    return {name: check_classifier(c, f"classifier {name!r}") for name, c in classifiers.items()}


def parts_by_name(given: Any, kind: type, known: registry.Registry[Any]) -> dict[str, Any]:
    """Attacks, or certifiers, by name.

    Args:
        given: a name, a part, several of these, or parts by name.
        kind: what they are to be.
        known: where names are looked up.

    Raises:
        InputError: nothing, something else, an unknown name, two of one name, a name that no folder can have.
    """
    what = known.kind
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        several = given if isinstance(given, (list, tuple)) else [given]
        if not all(isinstance(part, (str, kind)) for part in several):
            raise InputError(
                f"{what}s must be a name, a list of names, or {{name: {what}}}, not {brief(given)}; "
                f"robustknn list {what}s shows the names."
            )
        named = {}
        for part in several:
            name = part if isinstance(part, str) else str(to_config(part, known)["name"])
            if name in named:
                raise InputError(f"two {what}s are named {name!r}; pass them by name: {{'a': …, 'b': …}}.")
            named[name] = known.create(part) if isinstance(part, str) else part
    for name, part in named.items():
        check_name(name, what)
        if not isinstance(part, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise InputError(f"{what} {name!r} must be {article} {kind.__name__}, not {brief(part)}.")
    return named


def class_labels(named: Mapping[str, Classifier]) -> np.ndarray[Any, Any] | None:
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


def samples_of(data: Split | tuple[Any, Any], classes: np.ndarray[Any, Any] | None) -> Split:
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
    """Positions (n,) not to score on, by classifier; InputError for an unknown one or a wrong position."""
    if not isinstance(exclude, Mapping):
        raise InputError(f"exclude gives positions by classifier, {{'knn': [0, 1]}}, not {brief(exclude)}.")
    for name in exclude:
        if name not in named:
            raise unknown_name("classifier in exclude:", name, named)
    return {name: check_positions(value, n, f" in exclude[{name!r}]") for name, value in exclude.items()}


def refuse_stale(references: ReferenceSet) -> None:
    """InputError when the model is not, or no longer, the one that the references were made with."""
    if references.features is None or references.model_fingerprint is None:
        return
    if references.model_fingerprint != references.features.fingerprint():
        raise InputError(
            "the model has changed since the references were made with it (its weights, buffers or structure differ); "
            "build the references anew."
        )


def data_fingerprint(samples: Split, bounds: Bounds | None) -> str:
    """A sha256 of the samples, their labels and identities; InputError when one is out of bounds."""
    digest = hashlib.sha256()
    for positions in torch.arange(len(samples)).split(1000):
        batch = check_inputs(samples.batch(positions), bounds, "the data")
        store.update_with_tensor(digest, batch)
    store.update_with_tensor(digest, samples.labels)
    store.update_with_tensor(digest, samples.ids)
    return digest.hexdigest()


def fingerprints(classifiers: Mapping[str, Classifier]) -> dict[str, str]:
    """A sha256 of everything by which each classifier decides."""
    return {name: c.fingerprint() for name, c in classifiers.items()}


def identity_of(
    classifiers: Mapping[str, Classifier], samples: Split, bounds: Bounds | None, plan: Mapping[str, Any]
) -> dict[str, str]:
    """Hashes of everything that decides, by name; the classifiers' own are in the plan."""
    models = [c.extractor.fingerprint() for c in classifiers.values() if c.extractor is not None]
    told = {k: v for k, v in plan.items() if k not in ("describe", "class_names", "fingerprints")}
    return {
        "code version": code_fingerprint(),
        "config": store.fingerprint_config(told),
        "data": data_fingerprint(samples, bounds),
        "model": store.fingerprint_config({"models": models}),
        "references": store.fingerprint_config(plan["fingerprints"]),
    }


def voters_of(classifier: Classifier) -> tuple[Voter, ...]:
    """The voters of a classifier, none where it does not consist of any."""
    return classifier.voters if isinstance(classifier, VoterClassifier) else ()


def _attacked(references: ReferenceSet) -> str | None:
    """What adversarial references were made by, in words; None for clean ones."""
    made = references.made_by
    if made is None:
        return None
    eps = made["threat"]["eps"]
    radius = "several radii" if isinstance(eps, list) else f"{eps:.4g}"
    return f"adversarial, {made['attack']['name']}, {made['threat']['norm']} {radius}"


def describe_classifier(classifier: Classifier, banks: list[ReferenceSet]) -> dict[str, Any]:
    """What the report says of a classifier, as JSON; `bank` is the place of a voter's references in the gallery."""
    said: dict[str, Any] = {
        "type": type(classifier).__name__,
        "n_classes": classifier.n_classes,
    }
    if isinstance(classifier, DkNN) and classifier.is_calibrated:
        shares = {share: classifier.rejection_threshold(share) for share in REJECTED_SHARES}
        said["rejection"] = [{"share": s, "threshold": t} for s, t in shares.items()]
    if classifier.extractor is not None:
        said["model"] = type(classifier.extractor.model).__name__
    said["voters"] = [
        {
            "layer": v.layer,
            "n_neighbors": v.n_neighbors,
            "metric": v.metric,
            "references": len(v.references),
            "dim": v.index.dim,
            "index": type(v.index).__name__,
            "exact": v.index.exact,
            "engine": registry.indexes.name_of(type(v.index)) or type(v.index).__name__,
            "settings": settings_of(v.index),
            "bank": banks.index(v.references),
            "attacked": _attacked(v.references),
        }
        for v in voters_of(classifier)
    ]
    return said
