"""RAILS: the neighbors of an input evolve toward it, and those that come nearest decide.

Wang et al., "RAILS: A Robust Adversarial Immune-inspired Learning System", arXiv 2012.10485 and 2107.02840. What the
paper describes, not what was released with it: there the mutation mask is inverted, and cross-over prefers the parent
that is farther from the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from robustknn import registry, rng, store
from robustknn.checks import Bounds, check_layers, check_number, check_positive, check_positive_int, check_whole
from robustknn.classifiers.dknn import DkNN
from robustknn.classifiers.randomized import Randomized, numbered
from robustknn.classifiers.saved import Saved
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel

_FIELDS = (20, 20, 24)
"""How many of a gene's 64 random bits say which parent it comes from, whether it mutates, and by how much."""

_SELECTION = 1 / 20
"""The temperature of the selection, where none is given, as a share of the mean distance to the flock."""
_AT_ONCE = 4096
"""How many candidates go through the network at a time, but never fewer than those of one input."""
_LEAST = 1e-30
"""The least temperature: a flock may lie where the input does."""


@dataclass(frozen=True)
class Population:
    """The last generation for some inputs, at one layer and one draw: C classes of P candidates each.

    Attributes:
        rows: (n,) places of these inputs in the batch.
        layer: the place of the layer among the classifier's.
        draw: which of the draws this is.
        images: (n, C, P, …) candidates, in the input space.
        features: (n, C, P, D) theirs.
        distances: (n, C, P) float64, to the input's feature.
    """

    rows: Tensor
    layer: int
    draw: int
    images: Tensor
    features: Tensor
    distances: Tensor


@registry.classifiers.register("rails")
class RAILS(Saved, Randomized):
    """Every class breeds candidates that come near the input in feature space; the nearest of all vote.

    For an input x, at every layer l by itself, with affinity −‖f_l(x') − f_l(x)‖₂:

    * flocking: the `n_neighbors` references of each class that are nearest to x;
    * clonal expansion: copies of these, mutated, until all classes together have `population` candidates;
    * `generations` times, within each class: parents are drawn with probability softmax(affinity / temperature), two
      for each child; a gene (an input value) comes from the first with probability d₂ / (d₁ + d₂), so the nearer parent
      gives more; then it mutates: with probability ρ it changes by ± u, u uniform in [δ_min, δ], clipped to `bounds`;
    * consensus: the share of each class among the nearest `plasma` of all candidates, averaged over layers.

    δ and ρ start at the upper end of their ranges and shrink by `decay` down to the lower end each time the
    population's total affinity falls below its best so far.

    Its random numbers are counted from (seed, sample id): the same sample gets the same draw in every batch. An attack
    that asks again and again with one id meets one draw; re-check what it found with `fooled` under fresh ones.

    Args:
        references: labelled references with their images (`ReferenceSet.build(..., keep_images=True)`).
        layers: which of the references' layers; None takes all.
        n_neighbors: K, references of every class that are cloned.
        population: candidates of all classes together.
        generations: one number, or one a layer.
        temperature: T of the selection, in units of feature distance, one or one a layer; None takes a twentieth of
            the mean distance from the input to its flock, sample by sample.
        mutation_range: (δ_min, δ_max), in units of the input.
        mutation_probability: (ρ_min, ρ_max), a gene.
        decay: the factor by which range and probability shrink.
        plasma: the share of all candidates that votes.
        bounds: the least and greatest value of an input, None for any.
        draws: scores are averaged over so many independent draws.
        seed: of all draws.

    Raises:
        InputError: references without images or without a network, a parameter out of range.
    """

    registered = "rails"
    published_attack = MappingProxyType({"name": "pgd-transfer", "steps": 10})
    attackable = "use worst-case-fast, pgd with the objective knn-stage or evolved, or square"

    def __init__(
        self,
        references: ReferenceSet,
        *,
        layers: Sequence[str] | None = None,
        n_neighbors: int = 10,
        population: int = 1000,
        generations: int | Sequence[int] = 10,
        temperature: float | Sequence[float] | None = None,
        mutation_range: tuple[float, float] = (0.05, 0.15),
        mutation_probability: tuple[float, float] = (0.05, 0.15),
        decay: float = 0.9,
        plasma: float = 0.05,
        bounds: Bounds | None = (0.0, 1.0),
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(references, ReferenceSet):
            raise InputError(f"references must be a ReferenceSet, not {brief(references)}; see ReferenceSet.build.")
        if references.images is None:
            raise InputError("RAILS evolves the references' images; build them with keep_images=True.")
        if references.features is None:
            raise InputError("RAILS needs the network of its references; build them from data, or load them with it.")
        self.references = references
        self.n_classes = references.n_classes
        self.layers = _layers(references, layers)
        self.n_neighbors = check_positive_int(n_neighbors, "n_neighbors")
        self.population = check_whole(population, "population", self.n_classes)
        self.generations = tuple(check_whole(g, "generations", 0) for g in self._each(generations, "generations"))
        self.temperature = None
        if temperature is not None:
            self.temperature = tuple(check_positive(t, "temperature") for t in self._each(temperature, "temperature"))
        self.mutation_range = _ordered(mutation_range, "mutation_range", float("inf"))
        self.mutation_probability = _ordered(mutation_probability, "mutation_probability", 1.0)
        self.decay = check_number(decay, "decay", "above 0 and at most 1", lambda v: 0 < v <= 1)
        self.plasma = check_number(plasma, "plasma", "above 0 and at most 1", lambda v: 0 < v <= 1)
        self.bounds = ThreatModel(bounds=bounds).bounds  # refuses what are no bounds
        self.draws = check_positive_int(draws, "draws")
        self.seed = check_whole(seed, "seed")
        self.stage = self.knn_stage()

    def _each(self, value: Any, what: str) -> list[Any]:
        """One value a layer."""
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(self.layers)
        if len(values) != len(self.layers):
            raise InputError(f"{what} has {len(values)} entries for {len(self.layers)} layers; pass one each, or one.")
        return values

    # ------------------------------------------------------------------------------------ the parts

    @property
    def reference_sets(self) -> tuple[ReferenceSet, ...]:
        return (self.references,)

    @property
    def extractor(self) -> FeatureExtractor | None:
        return self.stage.extractor

    @property
    def voting(self) -> int:
        """How many candidates vote at each layer."""
        return max(1, int(self.plasma * self.per_class * self.n_classes))

    @property
    def per_class(self) -> int:
        """Candidates of one class."""
        return self.population // self.n_classes

    def knn_stage(self) -> DkNN:
        """RAILS without evolution, as a classifier of voters: the nearest `plasma` of the flock vote, at every layer.

        Its flock is n_neighbors of each class, so that is the vote of the plasma · n_neighbors · C nearest references
        (5 at the published setting). White-box attacks work on it; what they find is to be judged by RAILS itself.
        """
        k = max(1, int(self.plasma * self.n_neighbors * self.n_classes))
        return DkNN(self.references, min(k, len(self.references)), layers=self.layers)

    # --------------------------------------------------------------------------------------- deciding

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Shares of the votes (N, C), float64; without sample_ids the samples are numbered 0..N − 1."""
        x = self.place(x)
        ids = numbered(x, sample_ids)
        n = _distinct(x, ids)
        scores = torch.zeros(n, self.n_classes, dtype=torch.float64, device=x.device)
        for population in self.evolve(x[:n], ids[:n]):
            scores[population.rows] += self._votes(population) / (self.draws * len(self.layers))
        return torch.cat([scores, scores[:1].expand(len(x) - n, -1)])

    def _votes(self, population: Population) -> Tensor:
        """The share of each class among the nearest candidates, (n, C)."""
        nearest = torch.argsort(population.distances.flatten(1), dim=1, stable=True)[:, : self.voting]
        classes = nearest // self.per_class
        votes = torch.zeros(len(classes), self.n_classes, dtype=torch.float64, device=classes.device)
        return votes.scatter_add(1, classes, torch.full_like(classes, 1 / self.voting, dtype=torch.float64))

    @torch.no_grad()
    def evolve(self, x: Tensor, sample_ids: Tensor, draws: int | None = None) -> Iterator[Population]:
        """The last generations of all inputs, some inputs, one layer and one draw at a time.

        Args:
            x: (N, …) inputs, placed.
            sample_ids: (N,) what random numbers are counted from.
            draws: how many; the classifier's own number by default.
        """
        features = self.stage.read(x, self.layers)
        at_once = max(1, _AT_ONCE // (self.per_class * self.n_classes))
        for place, voter in enumerate(self.stage.voters):
            flocks = voter.index.search_classes(features[voter.layer], min(self.n_neighbors, len(self.references)))
            for rows in torch.arange(len(x), device=x.device).split(at_once):
                cells = _Cells(self, voter, place, features[voter.layer][rows], flocks.ids[rows], x)
                for draw in range(self.draws if draws is None else draws):
                    yield Population(rows, place, draw, *cells.mature(sample_ids[rows], draw))

    # ------------------------------------------------------------------------------------- transport

    def settings(self) -> dict[str, Any]:
        """The parameters as JSON can hold them."""
        names = ("n_neighbors", "population", "decay", "plasma", "draws", "seed")
        lists = ("layers", "generations", "temperature", "mutation_range", "mutation_probability", "bounds")
        plain = {name: getattr(self, name) for name in names}
        return plain | {n: None if getattr(self, n) is None else list(getattr(self, n)) for n in lists}

    def kept_references(self) -> ReferenceSet:
        return self.references

    def to(self, device: torch.device | str) -> Self:
        """Move references, images and model to a device (in place); returns itself."""
        self.references.to(device)
        self.stage = self.knn_stage()
        return self

    def fingerprint(self) -> str:
        images = self.references.images
        assert images is not None
        said = {"type": "rails", **self.settings(), "stage": self.stage.fingerprint()}
        return store.fingerprint_tensors({"images": images}, store.fingerprint_config(said))

    def __repr__(self) -> str:
        return f"RAILS({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


_Generation = tuple[Tensor, Tensor, Tensor]
"""Images (n, C, P, …), features (n, C, P, D), distances (n, C, P)."""


class _Cells:
    """The candidates for some inputs at one layer."""

    def __init__(self, rails: RAILS, voter: Voter, place: int, z: Tensor, flock: Tensor, like: Tensor) -> None:
        self.rails, self.voter, self.place, self.z = rails, voter, place, z
        present = flock >= 0
        count = present.sum(2, keepdim=True)  # the nearest come first, the missing ones of a small class last
        clones = torch.arange(rails.per_class, device=flock.device) % count
        self.clones = rails.references.image(flock.clamp_min(0).gather(2, clones)).to(like)
        rows = voter.references.rows(voter.layer, flock.clamp_min(0)).to(z).double()
        distances = (rows - z.double()[:, None, None]).norm(dim=3).masked_fill(~present, 0).flatten(1)
        mean = _sums(distances) / present.flatten(1).sum(1)
        given = rails.temperature
        temperature = (mean * _SELECTION).clamp_min(_LEAST) if given is None else torch.full_like(mean, given[place])
        self.temperature = temperature[:, None, None]

    def mature(self, ids: Tensor, draw: int) -> _Generation:
        """The last generation of one draw."""
        rails = self.rails
        low, high = zip(rails.mutation_range, rails.mutation_probability, strict=True)
        least, limits = (
            torch.tensor(v, dtype=torch.float64, device=ids.device).expand(len(ids), 2) for v in (low, high)
        )
        now = self._measure(self._mutate(self.clones, self._genes(ids, draw, 0)[1:], limits))
        best = torch.full((len(ids),), -float("inf"), dtype=torch.float64, device=ids.device)
        for generation in range(1, rails.generations[self.place] + 1):
            now = self._measure(self._breed(now, ids, draw, generation, limits))
            affinity = -_sums(now[2].flatten(1))
            shrunk = torch.maximum(least, limits * rails.decay)
            limits = torch.where((affinity < best)[:, None], shrunk, limits)
            best = torch.maximum(best, affinity)
        return now

    def _breed(self, now: _Generation, ids: Tensor, draw: int, generation: int, limits: Tensor) -> Tensor:
        """The next generation's images (n, C, P, …)."""
        images, _, distances = now
        n, n_classes, each = distances.shape
        tags = ("rails", self.place, draw, generation, "parents")
        u = rng.uniform(ids, (n_classes, 2 * each), self.rails.seed, *tags, dtype=torch.float64)
        odds = torch.softmax(-distances / self.temperature, 2).cumsum(2)
        parents = torch.searchsorted(odds, u * odds[..., -1:], right=True).clamp_max(each - 1)
        first, second = parents.split(each, 2)
        d1, d2 = distances.gather(2, first), distances.gather(2, second)
        share = torch.where(d1 + d2 > 0, d2 / (d1 + d2), 0.5)
        genes = self._genes(ids, draw, generation)
        rows = torch.arange(n, device=ids.device)[:, None, None]
        classes = torch.arange(n_classes, device=ids.device)[:, None]
        mixed = torch.where(
            genes[0] < _per_candidate(share, images), images[rows, classes, first], images[rows, classes, second]
        )
        return self._mutate(mixed, genes[1:], limits)

    def _genes(self, ids: Tensor, draw: int, generation: int) -> list[Tensor]:
        """Three uniform numbers in [0, 1) for every gene, each like the population (n, C, P, …), in float64."""
        tags = ("rails", self.place, draw, generation, "genes")
        count = self.clones[0].numel()
        raw = rng.bits(ids, count, self.rails.seed, *tags).view(self.clones.shape)
        numbers, shift = [], 0
        for width in _FIELDS:
            numbers.append(((raw >> shift) & ((1 << width) - 1)).double() * 2.0**-width)
            shift += width
        return numbers

    def _mutate(self, images: Tensor, genes: list[Tensor], limits: Tensor) -> Tensor:
        """Change each gene with its input's probability by at least δ_min and at most δ, up or down.

        Args:
            limits: (n, 2), δ and the probability.
        """
        chosen, amount = genes
        low = self.rails.mutation_range[0]
        size, chance = (_per_candidate(limit[:, None, None], images) for limit in limits.unbind(1))
        # One number says both: the lower half of it goes down, the upper half up.
        up = amount >= 0.5
        change = (low + (size - low) * (2 * amount - up.double())) * torch.where(up, 1.0, -1.0)
        mutated = torch.where(chosen < chance, images + change.to(images), images)
        return mutated if self.rails.bounds is None else mutated.clamp(*self.rails.bounds)

    def _measure(self, images: Tensor) -> _Generation:
        """Images with their features and distances."""
        features = self.rails.stage.read(images.flatten(0, 2), [self.voter.layer])[self.voter.layer]
        features = features.view(*images.shape[:3], -1)
        return images, features, (features.double() - self.z.double()[:, None, None]).norm(dim=3)


def _per_candidate(values: Tensor, images: Tensor) -> Tensor:
    """Values (n, C, P) or those they spread to, to be combined with the genes of images (n, C, P, …)."""
    return values.reshape(*values.shape, *[1] * (images.ndim - 3))


def _sums(rows: Tensor) -> Tensor:
    """The sum of each row, (n,), each summed by itself: in the same order in every batch."""
    return torch.stack([row.sum() for row in rows])


def _layers(references: ReferenceSet, layers: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(references.layer(layer) for layer in check_layers(layers) or references.layers)


def _ordered(value: Any, what: str, most: float) -> tuple[float, float]:
    """A pair (least, greatest) with 0 ≤ least ≤ greatest ≤ most."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise InputError(f"{what} must be (least, greatest), not {brief(value)}.")
    allowed = "of at least 0 and finite" if most == float("inf") else f"in [0, {most:g}]"
    low, high = (check_number(v, what, allowed, lambda v: 0 <= v <= most and v < float("inf")) for v in pair)
    if low > high:
        raise InputError(f"{what} is {brief(value)}; pass (least, greatest).")
    return low, high


def _distinct(x: Tensor, ids: Tensor) -> int:
    """How many rows are left when the copies of the first at the end, which fill up small batches, are taken away."""
    other = ((x != x[:1]).flatten(1).any(1) | (ids != ids[:1])).nonzero()[:, 0]
    return int(other[-1]) + 1 if len(other) else 1
