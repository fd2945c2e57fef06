"""The face of a nearest-neighbor classifier: scikit-learn's methods, torch's habits, saving and loading.

Parameters live in the constructor and are returned by `get_params`; the constructor does not compute.
References come with the constructor or from `fit`. NumPy in, NumPy out; tensors in, tensors out.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.checks import as_tensor, check_positive_int, class_numbers
from robustknn.classifiers.base import VoterClassifier
from robustknn.classifiers.rules import Rule, VoteShare
from robustknn.classifiers.saved import Saved, label_list, raw_inputs
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError, NotReadyError, unknown_name
from robustknn.features import FeatureExtractor
from robustknn.neighbors import NeighborIndex, Neighbors
from robustknn.reference import ReferenceSet

T = TypeVar("T")


class NeighborEstimator(Saved, VoterClassifier):
    """Base of classifiers whose voters are layers of one reference set. Subclasses name their layers.

    A subclass with several reference sets names the others in `further_sets`; each of them votes at every layer.

    Attributes:
        classes_: (C,) the class labels, in the order of the score columns.
    """

    needs_payload: str | None = None  # what its references must carry, as `ReferenceSet.build` is told
    _estimator_type = "classifier"

    references: ReferenceSet | None
    n_neighbors: int
    metric: str
    features: FeatureExtractor | None
    index: str | NeighborIndex
    batch_size: int

    def __init__(self) -> None:
        self._fitted: ReferenceSet | None = None
        self._classes: np.ndarray[Any, Any] | None = None
        self._cached: tuple[list[Any], tuple[Voter, ...], FeatureExtractor | None] | None = None
        if isinstance(self.references, ReferenceSet):
            self._parts()  # what cannot work says so now, not in the first prediction

    # ------------------------------------------------------------------------------------ the parts

    @abstractmethod
    def voter_layers(self, references: ReferenceSet) -> list[str]:
        """The layers that vote, by their canonical names."""

    def check_parameters(self) -> None:
        """Refuse parameters that cannot work: called when references are known (scikit-learn's convention)."""
        check_positive_int(self.n_neighbors, "n_neighbors")
        check_positive_int(self.batch_size, "batch_size")

    def check_references(self, references: ReferenceSet) -> None:
        """Refuse references without what the rule needs."""

    def voting_references(self, references: ReferenceSet) -> ReferenceSet:
        """The references as the rule takes them: under the labels that decide."""
        return references

    @property
    def references_(self) -> ReferenceSet:
        """The references in use: those fitted, or those given."""
        held = self._fitted if self._fitted is not None else self.references
        if held is None:
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"this {type(self).__name__} has no references; pass references= or call fit(X, y).")
        if not isinstance(held, ReferenceSet):
            raise InputError(f"references must be a ReferenceSet, not {type(held).__name__}; see ReferenceSet.build.")
        return held

    @property
    def reference_sets_(self) -> tuple[ReferenceSet, ...]:
        """All reference sets in use, `references_` first. At each layer they vote in this order."""
        return (self.references_, *(held for sets in self.further_sets().values() for held in sets))

    def _basis(self) -> list[Any]:
        """What the votes depend on: references, where they are, and parameters."""
        sets = self.reference_sets_
        layers = self.voter_layers(sets[0])
        return [sets, [s.device for s in sets], self.n_neighbors, self.metric, self.index, layers]

    def _parts(self) -> tuple[tuple[Voter, ...], FeatureExtractor | None]:
        """Voters and extractor, made again only when a parameter or the references changed."""
        key = self._basis()
        if self._cached is None or self._cached[0] != key:
            self.check_parameters()
            sets, layers = key[0], key[-1]
            for held in sets:
                self.check_references(held)
            sets = tuple(self.voting_references(held) for held in sets)
            voters = tuple(
                Voter.make(held, layer, self.n_neighbors, self.metric, self.index) for layer in layers for held in sets
            )
            extractor = sets[0].features
            if extractor is not None and list(extractor.layers) != layers:
                extractor = extractor.select(layers)
            self._cached = key, voters, extractor
        return self._cached[1], self._cached[2]

    @property
    def voters(self) -> tuple[Voter, ...]:
        return self._parts()[0]

    @property
    def extractor(self) -> FeatureExtractor | None:
        return self._parts()[1]

    @property
    def rule(self) -> Rule:
        return VoteShare()

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        return self.references_.n_classes

    @property
    def classes_(self) -> np.ndarray[Any, Any]:
        references = self.references_
        return np.arange(references.n_classes) if self._classes is None else self._classes

    @property
    def n_features_in_(self) -> int:
        """The size of an input of a classifier on plain vectors (scikit-learn's convention)."""
        if self._fitted is None or self._fitted.features is None or self.features is not None:
            raise AttributeError("n_features_in_ is known only after fit on plain vectors")
        return self._fitted.dim(self._fitted.layers[0])

    # ------------------------------------------------------------------------------- scikit-learn

    def fit(self, X: Any, y: Any) -> Self:
        """Read the references from (X, y).

        Args:
            X: (n, …) inputs. Without `features=` they are compared as they are, flattened.
            y: (n,) class labels of any kind; `classes_` holds the distinct ones in order.
        """
        raw = self.features is None
        given = self.references.features if isinstance(self.references, ReferenceSet) else None
        if raw and given is not None and not isinstance(given.model, nn.Identity):
            warnings.warn(
                "fit compares raw inputs, though the references given have a network: pass "
                "features=references.features to fit (or cross-validate) through it.",
                stacklevel=2,
            )
        X, y = self._check_fit(X, y) if raw else (as_tensor(X, "X"), y)
        self.check_parameters()
        classes, codes = np.unique(_plain(y), return_inverse=True)
        features = raw_inputs() if self.features is None else self.features
        references = self.read_references(features, X, codes)
        if self.n_neighbors > len(references):
            raise InputError(
                f"n_neighbors = {self.n_neighbors} exceeds the n_samples = {len(references)} references; lower it."
            )
        self._fitted, self._classes = references, classes
        self._parts()
        return self

    def read_references(self, features: FeatureExtractor, X: Any, y: Any) -> ReferenceSet:
        """The references that `fit` makes of inputs (n, …) and class numbers (n,)."""
        return ReferenceSet.build(features, (X, y), batch_size=self.batch_size)

    def _check_fit(self, X: Any, y: Any) -> tuple[Tensor, Any]:
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import check_X_y

        if isinstance(X, Tensor):
            check_classification_targets(_plain(y))
            return (X if X.is_floating_point() else X.float()), y
        X, y = check_X_y(X, y, dtype=[np.float64, np.float32], allow_nd=True, estimator=self)
        check_classification_targets(y)
        return as_tensor(X, "X"), y

    def _input(self, X: Any) -> tuple[Tensor, bool]:
        """The batch as a tensor, and whether it came as NumPy."""
        plain = not isinstance(X, Tensor)
        references = self.references_
        if plain and self._fitted is not None and self.features is None:
            from sklearn.utils.validation import check_array

            X = check_array(X, dtype=[np.float64, np.float32], allow_nd=True, estimator=self)
            size = int(np.prod(X.shape[1:]))
            if size != references.dim(references.layers[0]):
                raise InputError(
                    f"X has {size} features, but {type(self).__name__} is expecting "
                    f"{references.dim(references.layers[0])} features as input"
                )
        return self.place(X), plain

    def _in_batches(self, x: Tensor, f: Callable[[Tensor], T]) -> Iterator[T]:
        return (f(part) for part in x.split(self.batch_size))

    def predict(self, X: Any) -> Any:
        """The predicted class labels (N,): an array for arrays, a tensor of class numbers for tensors."""
        x, plain = self._input(X)
        labels = self._decisions(x)
        return self.classes_[labels.cpu().numpy()] if plain else self._outside(labels)

    def _decisions(self, x: Tensor) -> Tensor:
        return torch.cat(list(self._in_batches(x, lambda part: self.decide(self.look(part).scores))))

    def _outside(self, labels: Tensor) -> Tensor:
        if self._classes is None or not np.issubdtype(self._classes.dtype, np.integer):
            return labels
        return torch.from_numpy(self._classes).to(labels.device)[labels]

    def _codes(self, y: Any) -> Any:
        """The class numbers of labels of the kind that `fit` saw."""
        return y if self._classes is None else class_numbers(y, self._classes)

    def predict_proba(self, X: Any) -> Any:
        """Class scores scaled to sum to one, (N, C), columns in the order of `classes_`."""
        x, plain = self._input(X)
        scores = torch.cat(list(self._in_batches(x, lambda part: self.look(part).scores)))
        total = scores.sum(1, keepdim=True)
        # An approximate index may find no neighbor at all: then nothing is known.
        shares = torch.where(total > 0, scores / total, 1 / scores.shape[1])
        return shares.cpu().numpy() if plain else shares

    def score(self, X: Any, y: Any) -> float:
        """The share of correct predictions."""
        truth = _plain(y)
        x, _ = self._input(X)
        if truth.shape != (len(x),):
            raise InputError(f"y has shape {truth.shape} for {len(x)} samples; pass one label a sample.")
        return float(np.mean(self.classes_[self._decisions(x).cpu().numpy()] == truth))

    def _search(self, x: Tensor, voter: Voter, k: int) -> Neighbors:
        def find(part: Tensor) -> Neighbors:
            with torch.no_grad():
                return voter.index.search(self.read(part, [voter.layer])[voter.layer], k)

        found = list(self._in_batches(x, find))
        return Neighbors(torch.cat([f.distances for f in found]), torch.cat([f.ids for f in found]))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's parameters."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any) -> Self:
        """Change parameters; an unknown one raises InputError with close matches."""
        for name, value in params.items():
            if name not in self._parameters():
                raise unknown_name(f"parameter of {type(self).__name__}:", name, self._parameters())
            setattr(self, name, value)
        return self

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return self._fitted is not None or self.references is not None

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(three_d_array=True),
        )

    # --------------------------------------------------------------------------------------- torch

    def to(self, device: torch.device | str) -> Self:
        """Move references, index and model to a device (in place); returns itself."""
        for held in self.reference_sets_:
            held.to(device)
        if self.features is not None:
            self.features.to(device)
        self.__dict__.update(self.__getstate__())
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the indexes, which would hold the references once more."""
        return {**self.__dict__, "_cached": None, "_other_voters": {}}

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.get_params().items() if k not in ("features", "batch_size") and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    # ----------------------------------------------------------------------------------- transport

    def settings(self) -> dict[str, Any]:
        """The parameters that JSON can hold: all but references and features; of an index of one's own its kind."""
        held = {"references", "features", *self.further_sets()}
        params = {k: v for k, v in self.get_params().items() if k not in held}
        if not isinstance(self.index, str):
            params["index"] = type(self.index).__name__
        return {k: v.item() if isinstance(v, np.generic) else v for k, v in params.items()}

    def fingerprint(self) -> str:
        """A sha256 of the parameters, the references and the model; InputError for parameters that cannot work."""
        self.check_parameters()
        settings = {k: v for k, v in self.settings().items() if k != "batch_size"}
        extractor = self.extractor
        return store.fingerprint_config(
            {
                "type": self.registered,
                **settings,
                **self._state(),
                **self._answers(),
                **self._further_fingerprints(),
                "references": self.references_.fingerprint(),
                "model": None if extractor is None else extractor.fingerprint(),  # as it is now
            }
        )

    def _answers(self) -> dict[str, Any]:
        """What an approximate index finds for some references: its kind, settings and size do not tell."""
        voter = None if self.index == "exact" else self.voters[0]
        if voter is None or voter.index.exact:
            return {}
        rows = self.references_.rows(voter.layer, torch.arange(min(64, len(self.references_))))
        found = voter.index.search(rows, self.n_neighbors)
        return {"answers": store.fingerprint_tensors({"ids": found.ids})}

    def _restore(self, state: dict[str, Any], classes: list[Any] | None) -> None:
        if classes is not None:
            self._classes = np.asarray(classes)

    def kept_references(self) -> ReferenceSet:
        if not isinstance(self.index, str):
            raise InputError(
                "a classifier with an index of your own is not saved whole; save references and index, each with its "
                "save(path), and put them together again."
            )
        return self.references_

    def kept_classes(self) -> list[Any] | None:
        return label_list(self._classes)


def _plain(y: Any) -> np.ndarray[Any, Any]:
    """Labels as an array."""
    return y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)


def require(value: T | None, sentence: str) -> T:
    """The value, or NotReadyError with the sentence when it is None."""
    if value is None:
        raise NotReadyError(sentence)
    return value
