"""Classifiers as directories: what they decide by, without the model, and the way back around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn

from robustknn import registry, store
from robustknn.classifiers.base import Classifier
from robustknn.errors import InputError, IntegrityError, brief
from robustknn.features import FeatureExtractor, model_fingerprint
from robustknn.reference import ReferenceSet

KIND, SCHEMA, FILE = "classifier", 1, "classifier.json"


class Saved(Classifier):
    """A classifier that is written as a directory: `classifier.json`, its reference sets, classifiers inside it.

    Attributes:
        registered: the name by which it is made again, of `settings()` and what was saved beside them.
    """

    registered: str

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The parameters that JSON can hold."""

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
        """Write the classifier as a directory, whole or not at all. The model is not saved.

        Raises:
            InputError: something is there and may not be replaced, or a part cannot be saved.
        """
        classes, references = self.kept_classes(), self.kept_references()
        sets = {} if references is None else {"references": references}
        further = self.further_sets()
        for name, folders in _folders(further).items():
            sets |= dict(zip(folders, further[name], strict=True))
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
        with store.swapped(Path(path), FILE, lambda place: _refuse_existing(place, overwrite)) as folder:
            for name, held in sets.items():
                held.save(folder / name)
            for name, classifier in self.inner().items():
                classifier.save(folder / name)
            store.write_sealed(folder / FILE, content)

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
    if model is not None and not isinstance(model, (FeatureExtractor, nn.Module)):
        raise InputError(f"model must be a torch module or a FeatureExtractor, not {brief(model)}.")
    store.take_back(path, FILE)
    content = store.read_sealed(path / FILE)
    if (content.get("kind"), content.get("schema")) != (KIND, SCHEMA):
        raise IntegrityError(f"{str(path)!r} holds no classifier of schema {SCHEMA}.")
    parts = {name: load_classifier(path / name, model, mapped) for name in content.get("inner", {})}
    if {name: part.fingerprint() for name, part in parts.items()} != content.get("inner", {}):
        if model is None:
            raise InputError(f"{str(path)!r} was saved around a model, which is not saved with it; pass it as model=.")
        raise IntegrityError(f"the classifier inside {str(path)!r} is not the one that it was saved with.")
    sets = _sets(path, content, model, mapped) if content["references"] is not None else {}
    made = registry.classifiers.create(content["type"], **parts, **sets, **content["settings"])
    if not isinstance(made, Saved):
        raise IntegrityError(f"{content['type']!r} is not a classifier that can be loaded.")
    made._restore(content["state"], content["classes"])
    return made


def _refuse_existing(path: Path, overwrite: bool) -> None:
    """InputError where something is at the path and may not be replaced: only whole classifiers of ours ever are."""
    store.take_back(path, FILE)
    if not path.exists():
        return
    if not (path / FILE).is_file():
        raise InputError(f"{str(path)!r} exists and is not a classifier of ours; it is not overwritten.")
    if not overwrite:
        raise InputError(f"{str(path)!r} exists; choose another path or allow overwriting it.")
    held = store.read_sealed(path / FILE)
    sets = {folder for folders in _folders(held.get("further", {})).values() for folder in folders}
    inner = set(held.get("inner", {}))
    sets |= {"references"} if held["references"] is not None else set()
    others = sorted({each.name for each in path.iterdir()} - sets - inner - {FILE})
    if others:
        raise InputError(f"{str(path)!r} holds {brief(others[0])}, which is no part of the classifier; move that away.")
    for name in sets:  # what is no part of these is not removed with them either
        store.refuse_existing(path / name, overwrite)
    for name in inner:
        _refuse_existing(path / name, overwrite)


def _sets(
    path: Path, content: Mapping[str, Any], model: FeatureExtractor | nn.Module | None, mapped: bool
) -> dict[str, Any]:
    """The reference sets of a saved classifier, by the parameters that take them."""
    references = ReferenceSet.load(path / "references", model, mapped)
    if model is None and references.model_fingerprint == model_fingerprint(raw_inputs().model):
        references.features = raw_inputs()
    further = {
        name: [ReferenceSet.load(path / folder, references.features, mapped) for folder in folders]
        for name, folders in _folders(content.get("further", {})).items()
    }
    found = {name: [held.fingerprint() for held in sets] for name, sets in further.items()}
    if references.fingerprint() != content["references"] or found != content.get("further", {}):
        raise IntegrityError(f"the references in {str(path)!r} are not those the classifier was saved with.")
    return {"references": references, **further}


def _folders(further: Mapping[str, Sized]) -> dict[str, list[str]]:
    """The folders of the further reference sets, by the parameter that takes them."""
    return {name: [f"{name}-{place}" for place in range(len(sets))] for name, sets in further.items()}


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
