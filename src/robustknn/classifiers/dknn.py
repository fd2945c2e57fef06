"""Deep k-nearest neighbors: several layers vote, and a calibration set says how far to believe them.

Papernot & McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable and Robust Deep Learning",
arXiv 1803.04765, section III and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from robustknn import registry
from robustknn.batching import batches
from robustknn.checks import check_choice, check_labels, check_number, check_positive_int
from robustknn.classifiers.base import Look
from robustknn.classifiers.conformal import check_coverage, cutoffs
from robustknn.classifiers.estimator import NeighborEstimator, require
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.reference import ReferenceSet


@dataclass(frozen=True)
class ReliabilityBin:
    """Inputs whose credibility lies in [low, high] (the upper end belongs to the next bin but for the last)."""

    low: float
    high: float
    count: int
    accuracy: float | None


@registry.classifiers.register("dknn")
class DkNN(NeighborEstimator):
    """The class most often found among the k nearest references at every layer, with conformal credibility.

    With Ω_l the labels of the k nearest at layer l, the nonconformity of class j is
    α(x, j) = Σ_l |{i ∈ Ω_l : i ≠ j}|, and its p-value the share of calibration samples at least as
    nonconforming with their own label: p_j(x) = |{a ∈ A : a ≥ α(x, j)}| / |A|. The prediction is the class
    with the largest p-value, and of those tied the one with the least α. Credibility is the largest p-value,
    confidence one minus the second largest.

    Args:
        references: the labelled references; or None, and `fit(X, y)` makes them.
        n_neighbors: k, at every layer.
        metric: "l2", "cosine" or "ip".
        layers: which of the references' layers vote; None takes all.
        comparison: ">=" counts calibration samples as the paper does; ">" as AdvKNN does (arXiv 1911.06591,
            eq. 5).
        correction: "paper" divides by |A|; "conformal" adds the input itself to the calibration set,
            (1 + count) / (1 + |A|), which makes the p-value valid for finite |A| (Vovk et al.).
        features: the extractor for `fit`; None compares raw inputs.
        index: the search engine, by name.
        batch_size: samples a forward pass in `predict` and its kin.
    """

    registered = "dknn"
    # AdvKNN (arXiv 1911.06591), section 4: steps of 0.01 at eps 0.25, on the network.
    published_attack = MappingProxyType({"name": "bim-transfer", "steps": 100, "step": 0.04})

    def __init__(
        self,
        references: ReferenceSet | None = None,
        n_neighbors: int = 75,
        *,
        metric: str = "l2",
        layers: Sequence[str] | None = None,
        comparison: str = ">=",
        correction: str = "paper",
        features: FeatureExtractor | None = None,
        index: str = "exact",
        batch_size: int = 256,
    ) -> None:
        self.references = references
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.layers = layers
        self.comparison = comparison
        self.correction = correction
        self.features = features
        self.index = index
        self.batch_size = batch_size
        self._calibration: Tensor | None = None
        self._least: Tensor | None = None
        self._calibration_labels: Tensor | None = None
        self._calibrated_for: list[Any] = []
        super().__init__()

    def voter_layers(self, references: ReferenceSet) -> list[str]:
        return chosen_layers(self.layers, references)

    def check_parameters(self) -> None:
        super().check_parameters()
        check_choice(self.comparison, (">=", ">"), "comparison")
        check_choice(self.correction, ("paper", "conformal"), "correction")

    # --------------------------------------------------------------------------------- calibration

    def calibrate(self, X: Any, y: Any = None) -> Self:
        """Measure the nonconformity of held-out samples with their own label.

        Args:
            X: (n, …) inputs with `y` their labels, or a split, Dataset or DataLoader that yields both. They
                must not be among the references, the training data, or the samples later reported on.
        """
        data = X if y is None else (X, self._codes(y))  # batches take no labels but numbers
        scores, least, owns = [], [], []
        for x, labels in batches(data, self.batch_size):
            alpha = self._alphas(self.place(x))
            least.append(alpha.amin(1))
            own = check_labels(self._codes(labels) if y is None else labels, len(x), self.n_classes).to(alpha.device)
            scores.append(alpha.gather(1, own[:, None])[:, 0])
            owns.append(own)
        if not scores:
            raise InputError("there is no calibration sample; pass at least one.")
        held = torch.cat(scores).cpu().sort(stable=True)
        self._calibration, self._calibrated_for = held.values, self._votes_by()
        self._calibration_labels = torch.cat(owns).cpu()[held.indices]
        self._least = torch.cat(least).cpu().sort().values
        return self

    def _votes_by(self) -> list[Any]:
        """What nonconformity depends on: a calibration holds for nothing else."""
        references, _, *parameters = self._basis()
        return [references, *parameters]

    @property
    def calibration_(self) -> Tensor:
        """The sorted nonconformities of the calibration samples, (n,) int64."""
        return require(
            self._calibration if self.is_calibrated else None,
            "credibility needs calibration; call calibrate(x, y) with held-out samples first, and again after "
            "changing references or parameters.",
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` was called, with the references and parameters of now."""
        return self._calibration is not None and self._calibrated_for == self._votes_by()

    def adopt_calibration(self, other: DkNN) -> None:
        """Believe neighbors as another classifier does, found by another index: its calibration, as it is."""
        if other.is_calibrated:
            self._calibration, self._least = other._calibration, other._least
            self._calibration_labels = other._calibration_labels
            self._calibrated_for = self._votes_by()

    # ------------------------------------------------------------------------------------ p-values

    def nonconformity(self, X: Any) -> Any:
        """α(x, j) for every class, (N, C) int64. A neighbor that an approximate index missed is of no class."""
        x, plain = self._input(X)
        alpha = self._alphas(x)
        return alpha.cpu().numpy() if plain else alpha

    def _alphas(self, x: Tensor) -> Tensor:
        return torch.cat(list(self._in_batches(x, lambda part: self._nonconformity(self.look(part).scores))))

    def _nonconformity(self, scores: Tensor) -> Tensor:
        total = self.n_neighbors * len(self.voters)
        return total - (scores * total).round().to(torch.int64)

    def _p_values(self, alpha: Tensor) -> Tensor:
        self.check_parameters()  # what set_params changed since the calibration
        held = self.calibration_.to(alpha.device)
        below = torch.searchsorted(held, alpha.contiguous(), right=self.comparison == ">")
        count = (len(held) - below).double()
        return count / len(held) if self.correction == "paper" else (count + 1) / (len(held) + 1)

    def p_values(self, X: Any) -> Any:
        """The empirical p-value of every class, (N, C)."""
        x, plain = self._input(X)
        p = self._p_values(self._alphas(x))
        return p.cpu().numpy() if plain else p

    def credibility(self, X: Any) -> Any:
        """The largest p-value, (N,): how well the training data supports the prediction."""
        p = self.p_values(X)
        return p.amax(1) if isinstance(p, Tensor) else p.max(1)

    def confidence(self, X: Any) -> Any:
        """One minus the second largest p-value, (N,): how far the other classes are ruled out."""
        p = self.p_values(X)
        if isinstance(p, Tensor):
            return 1 - _second(p)
        return 1 - _second(torch.from_numpy(p)).numpy()

    def details(self, look: Look) -> dict[str, Tensor]:
        if not self.is_calibrated:
            return {}
        p = self._p_values(self._nonconformity(look.scores))
        return {"credibility": p.amax(1), "confidence": 1 - _second(p)}

    def credibility_of(self, scores: Tensor) -> Tensor:
        """The credibility (N,) of decisions with these scores (N, C)."""
        return self._p_values(self._nonconformity(scores)).amax(1)

    def predict_set(self, X: Any, coverage: float = 0.9, per_class: bool = False) -> Any:
        """The classes that cannot be ruled out, (N, C) bool, columns in the order of `classes_`.

        Split conformal prediction: class j is in the set of x where α(x, j) is at most the ⌈(n + 1) · coverage⌉-th
        smallest nonconformity of the n calibration samples. If these and the inputs are exchangeable (drawn alike, as
        inputs that nobody attacks are), the true class is in the set with at least this probability. It may be empty.

        Args:
            X: (N, …) inputs.
            coverage: the least probability, above 0 and below 1.
            per_class: hold it for the inputs of every class by itself, by the calibration samples of that class.

        Raises:
            NotReadyError: not calibrated.
            InputError: too few calibration samples (of a class) for this coverage.
        """
        check_coverage(coverage)
        held, labels = self.calibration_, None
        if per_class:
            labels = require(
                self._calibration_labels,
                "sets per class need a calibration by this version; call calibrate(x, y) again.",
            )
        most = cutoffs(held, labels, self.n_classes, float(coverage))
        x, plain = self._input(X)
        alpha = self._alphas(x)
        inside = alpha <= most.to(alpha.device)
        return inside.cpu().numpy() if plain else inside

    def rejection_threshold(self, share: float) -> float:
        """The largest credibility below which at most this share of the calibration samples lies.

        Rejecting inputs of less credibility rejects about that share of clean inputs, whatever their decision.
        """
        check_number(share, "share", "in [0, 1)", lambda v: 0 <= v < 1)
        calibration = self.calibration_  # says when there is none
        least = require(self._least, "rejection needs a calibration by this version; call calibrate(x, y) again.")
        credibility = self._p_values(least[:, None].to(calibration.device)).amax(1).sort().values
        return float(credibility[int(share * len(credibility))])

    def reliability_table(self, X: Any, y: Any, bins: int = 10) -> list[ReliabilityBin]:
        """Accuracy by credibility, in `bins` equal bins of [0, 1] (the paper's reliability diagram, fig. 3)."""
        check_positive_int(bins, "bins")
        x, _ = self._input(X)
        alpha = self._alphas(x)
        credibility = self._p_values(alpha).amax(1)
        truth = check_labels(self._codes(y), len(x), self.n_classes).to(alpha.device)
        correct = (alpha.argmin(1) == truth).double()
        # A share of n samples times the bins may round to just below a whole number: 0.29 · 100 = 28.999….
        place = (credibility * bins + 1e-9).floor().clamp_max(bins - 1)
        table = []
        for b in range(bins):
            inside = place == b
            count = int(inside.sum())
            accuracy = float(correct[inside].mean()) if count else None
            table.append(ReliabilityBin(b / bins, (b + 1) / bins, count, accuracy))
        return table

    def kneighbors(self, X: Any, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        """The nearest references of each input at every layer: {layer: (distances (N, k), ids (N, k))}."""
        x, plain = self._input(X)
        k = check_positive_int(self.n_neighbors if n_neighbors is None else n_neighbors, "n_neighbors")
        result: dict[str, Any] = {}
        for voter in self.voters:
            found = self._search(x, voter, k)
            pair: Any = (found.distances, found.ids)
            if plain:
                pair = tuple(t.cpu().numpy() for t in pair)
            result[voter.layer] = pair if return_distance else pair[1]
        return result

    # ----------------------------------------------------------------------------------- transport

    def _state(self) -> dict[str, Any]:
        known = self.is_calibrated
        least = None if not known or self._least is None else self._least.tolist()
        labels = None if not known or self._calibration_labels is None else self._calibration_labels.tolist()
        return {
            "calibration": self.calibration_.tolist() if known else None,
            "calibration_least": least,
            "calibration_labels": labels,
        }

    def _restore(self, state: dict[str, Any], classes: list[Any] | None) -> None:
        super()._restore(state, classes)
        if state.get("calibration") is not None:
            self._calibration = torch.tensor(state["calibration"], dtype=torch.int64)
            self._calibrated_for = self._votes_by()
        if state.get("calibration_least") is not None:
            self._least = torch.tensor(state["calibration_least"], dtype=torch.int64)
        if state.get("calibration_labels") is not None:
            self._calibration_labels = torch.tensor(state["calibration_labels"], dtype=torch.int64)


def chosen_layers(layers: Any, references: ReferenceSet) -> list[str]:
    """The layers of a parameter `layers`, by their canonical names; None takes all that the references hold."""
    chosen = references.layers if layers is None else layers
    if isinstance(chosen, str):
        chosen = [chosen]
    if not isinstance(chosen, (list, tuple)) or not chosen:
        raise InputError(f"layers must be a list of layers' names, or None for all, not {brief(chosen)}.")
    return [references.layer(layer) for layer in chosen]


def _second(p: Tensor) -> Tensor:
    """The second largest of each row (0 when there is one class)."""
    return p.topk(2, dim=1).values[:, 1] if p.shape[1] > 1 else torch.zeros_like(p[:, 0])
