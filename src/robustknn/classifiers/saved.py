"""Classifiers as directories: what they decide by, without the model, and the way back around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn

from robustknn import registry, store
from robustknn.classifiers.base import Classifier
from robustknn.errors import InputError, IntegrityError
from robustknn.features import FeatureExtractor, model_fingerprint
from robustknn.reference import ReferenceSet

KIND, SCHEMA = "classifier", 1


class Saved(Classifier):
    """A classifier that is written as a directory: `classifier.json`, its reference sets, classifiers inside it.

    Attributes:
        registered: the name by which it is made again, of `settings()` and what was saved beside them.
    """

    registered: str

    def settings(self) -> dict[str, Any]:
        """The parameters that JSON can hold."""
        raise NotImplementedError

    def kept_references(self) -> ReferenceSet | None:
        """The references that are saved; None for a classifier that stands on those of another."""
        return None

    def further_sets(self) -> dict[str, list[ReferenceSet]]:
        """Reference sets beside the first, by the parameter that takes them."""
        return {}

    def inner(self) -> Mapping[str, Saved]:
        """The classifiers that it is made over, by the parameter that takes them."""
        return {}

    def kept_classes(self) -> list[Any] | None:
        """The labels by class number, as JSON; None for the class numbers."""
        return None

    def _state(self) -> dict[str, Any]:
        """What was computed beside the references and must be saved, as JSON."""
        return {}

    def _restore(self, state: dict[str, Any], classes: list[Any] | None) -> None:
        """Take back what `_state` and `kept_classes` gave."""

    def _further_fingerprints(self) -> dict[str, list[str]]:
        return {name: [held.fingerprint() for held in sets] for name, sets in self.further_sets().items()}

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the classifier as a directory. The model is not saved."""
        path = Path(path)
        if path.exists() and not (path / "classifier.json").is_file():
            raise InputError(f"{str(path)!r} exists and is not a classifier of ours; it is not overwritten.")
        classes, references = self.kept_classes(), self.kept_references()
        if references is not None:
            references.save(path / "references", overwrite)
        for name, sets in self.further_sets().items():
            for place, held in enumerate(sets):
                held.save(path / f"{name}-{place}", overwrite)
        for name, classifier in self.inner().items():
            classifier.save(path / name, overwrite)
        content = {
            "format": store.FORMAT,
            "kind": KIND,
            "schema": SCHEMA,
            "type": self.registered,
            "settings": self.settings(),
            "state": self._state(),
            "classes": classes,
            "references": None if references is None else references.fingerprint(),
            "further": self._further_fingerprints(),
            "inner": {name: classifier.fingerprint() for name, classifier in self.inner().items()},
        }
        store.write_sealed(path / "classifier.json", content)

    @classmethod
    def load(cls, path: str | Path, model: FeatureExtractor | nn.Module | None = None, mapped: bool = False) -> Self:
        """Read a saved classifier around its model; one that was fitted on raw inputs needs none.

        Raises:
            IntegrityError: a file is not whole, or the model or the references are not those it was saved with.
        """
        made = load_classifier(path, model, mapped)
        if not isinstance(made, cls):
            raise IntegrityError(f"{str(path)!r} holds a {type(made).__name__}, not a {cls.__name__}.")
        return made


def load_classifier(path: str | Path, model: FeatureExtractor | nn.Module | None = None, mapped: bool = False) -> Saved:
    """Read any classifier saved with `save`, around its model. See `Saved.load`."""
    path = Path(path)
    content = store.read_sealed(path / "classifier.json")
    if (content.get("kind"), content.get("schema")) != (KIND, SCHEMA):
        raise IntegrityError(f"{str(path)!r} holds no classifier of schema {SCHEMA}.")
    parts = {name: load_classifier(path / name, model, mapped) for name in content.get("inner", {})}
    if {name: part.fingerprint() for name, part in parts.items()} != content.get("inner", {}):
        raise IntegrityError(f"the classifier inside {str(path)!r} is not the one that it was saved with.")
    sets = _sets(path, content, model, mapped) if content["references"] is not None else {}
    made = registry.classifiers.create(content["type"], **parts, **sets, **content["settings"])
    if not isinstance(made, Saved):
        raise IntegrityError(f"{content['type']!r} is not a classifier that can be loaded.")
    made._restore(content["state"], content["classes"])
    return made


def _sets(
    path: Path, content: Mapping[str, Any], model: FeatureExtractor | nn.Module | None, mapped: bool
) -> dict[str, Any]:
    """The reference sets of a saved classifier, by the parameters that take them."""
    references = ReferenceSet.load(path / "references", model, mapped)
    if model is None and references.model_fingerprint == model_fingerprint(raw_inputs().model):
        references.features = raw_inputs()
    further = {
        name: [ReferenceSet.load(path / f"{name}-{i}", references.features, mapped) for i in range(len(prints))]
        for name, prints in content.get("further", {}).items()
    }
    found = {name: [held.fingerprint() for held in sets] for name, sets in further.items()}
    if references.fingerprint() != content["references"] or found != content.get("further", {}):
        raise IntegrityError(f"the references in {str(path)!r} are not those the classifier was saved with.")
    return {"references": references, **further}


def raw_inputs() -> FeatureExtractor:
    """Inputs as they are, flattened."""
    return FeatureExtractor(nn.Identity())


def label_list(classes: np.ndarray[Any, Any] | None) -> list[Any] | None:
    """Class labels as JSON holds them; InputError for what it cannot hold."""
    if classes is None:
        return None
    labels: list[Any] = classes.tolist()
    if not all(isinstance(label, (int, str)) for label in labels):
        raise InputError(f"class labels of type {classes.dtype} cannot be saved; use integers or text.")
    return labels
