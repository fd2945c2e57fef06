"""Distances to guides, copied or where they lie, beside float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustknn import PGD, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, store
from robustknn.classifiers.voters import Voter
from robustknn.neighbors import ExactIndex
from robustknn.neighbors.base import Metric
from robustknn.neighbors.refine import exact_keys
from robustknn.neighbors.stored import chosen_products, products_with, weighted_sums
from robustknn.objectives import ASK, Adaptive, NeighborHinge, Objective, RankPair, guides
from robustknn.objectives.guides import Gathered, Guides, InPlace

N, G, D = 5, 7, 600


@pytest.fixture
def references() -> Tensor:
    return torch.randn(200, D, generator=torch.Generator().manual_seed(0))


def case(references: Tensor, metric: str) -> tuple[Voter, Tensor, Tensor]:
    """A voter, ids of which some are missing, and features."""
    generator = torch.Generator().manual_seed(1)
    held = ReferenceSet.from_vectors(references, torch.arange(200) % 10)
    voter = DkNN(held, 5, metric=metric).voters[0]
    ids = torch.stack([torch.randperm(200, generator=generator)[:G] for _ in range(N)])
    ids[1, 3] = ids[4, 0] = -1
    return voter, ids, torch.randn(N, D, generator=generator) + references.mean()


def by_hand(references: Tensor, z: Tensor, metric: str) -> Tensor:
    """Distances (N, n) in float64."""
    wide, rows = z.double(), references.double()
    if metric == "cosine":
        return 1 - (wide @ rows.T) / (wide.norm(dim=1, keepdim=True) * rows.norm(dim=1))
    return (wide[:, None] - rows).norm(dim=2)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("least", [1, 10_000])
def test_distances_and_gradients_are_those_of_float64(
    references: Tensor, metric: str, least: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides, "LEAST_DIM", least)
    references = references + offset
    voter, ids, z = case(references, metric)
    made = Guides.of(voter, ids, z)
    assert isinstance(made.rows, InPlace if least == 1 else Gathered)
    there, known = ids >= 0, ids.clamp_min(0)
    # Where they were looked up, a step away, and of some samples only.
    for kept in (torch.arange(N), torch.tensor([4, 1])):
        some = made.select(kept)
        for moved in (z[kept], z[kept] + 0.1 * torch.randn(len(kept), D, generator=torch.Generator().manual_seed(2))):
            x, weights = moved.clone().requires_grad_(True), torch.rand(len(kept), G)
            (gradient,) = torch.autograd.grad((some.distances(x).masked_fill(~there[kept], 0) * weights).sum(), x)
            wide = moved.double().requires_grad_(True)
            want = by_hand(references, wide, metric).gather(1, known[kept]).masked_fill(~there[kept], 0)
            (steepest,) = torch.autograd.grad((want * weights).sum(), wide)
            # The distances of features that are all about the same are what is left of much larger numbers.
            scale = float(want.detach().abs().max())
            found = some.distances(x).masked_fill(~there[kept], 0)
            assert (found - want).abs().max() < (1e-5 if offset == 0 else 2e-3) * scale
            assert (gradient - steepest).norm() < (1e-5 if offset == 0 else 2e-2) * steepest.norm()


def test_inner_products_and_short_vectors_and_other_types_are_copied(references: Tensor) -> None:
    voter, ids, z = case(references, "ip")
    assert isinstance(Guides.of(voter, ids, z).rows, Gathered)
    voter, ids, z = case(references, "l2")
    assert isinstance(Guides.of(voter, ids, z).rows, InPlace)
    assert isinstance(Guides.of(voter, ids, z.double()).rows, Gathered)
    voter, ids, z = case(references[:, :500], "l2")
    assert isinstance(Guides.of(voter, ids, z[:, :500]).rows, Gathered)


def test_an_index_says_whether_its_references_can_be_read_where_they_lie(references: Tensor, tmp_path: Path) -> None:
    held = ExactIndex("cosine").build(references).stored()
    assert held is not None
    assert held.norm(dim=1) == pytest.approx(torch.ones(200), abs=1e-6)
    held = ExactIndex().build(references).stored()
    assert held is not None
    assert held.data_ptr() == references.data_ptr()
    assert ExactIndex().build(references.half()).stored() is None
    # Cosine searches vectors on a disk as they came, and reads them as it searches.
    store.save_array(tmp_path / "rows.npy", references)
    mapped = store.load_array(tmp_path / "rows.npy", mapped=True)
    assert ExactIndex().build(mapped).stored() is None
    assert ExactIndex("cosine").build(mapped).stored() is None


def test_chosen_products_sums_and_squares(references: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, D, generator=generator)
    ids = torch.tensor([[5, 9, 199], [0, -1, 1], [-1, -1, -1]])
    rows = references[ids.clamp_min(0)].double()
    want = (rows * z.double()[:, None]).sum(2)
    there = ids >= 0
    found = products_with(references, z, ids)
    assert found[there].tolist() == pytest.approx(want[there].tolist(), rel=1e-4, abs=1e-4)
    assert found[~there].tolist() == [0.0] * 4
    squares = exact_keys(Metric("l2"), z, references, ids, torch.float32)
    want = (rows - z.double()[:, None]).square().sum(2)
    assert squares[there].tolist() == pytest.approx(want[there].tolist(), rel=1e-5)
    weights = torch.rand(3, 3, generator=generator)
    want = (rows * weights.double()[..., None]).sum(1)
    assert torch.allclose(weighted_sums(references, ids.clamp_min(0), weights).double(), want, atol=1e-5)
    ragged = chosen_products(references, z, torch.tensor([1, 2, 3]), torch.tensor([0, 0, 2, 3]))
    assert ragged.tolist() == pytest.approx(
        [float(z[1] @ references[i]) for i in (1, 2)] + [float(z[2] @ references[3])], abs=1e-3
    )
    assert len(chosen_products(references, z[:0], ids[:0, 0], torch.zeros(1, dtype=torch.int64))) == 0


def test_a_row_does_not_depend_on_the_others(references: Tensor) -> None:
    voter, ids, z = case(references, "l2")
    whole = Guides.of(voter, ids, z)
    moved = z + 0.1
    for i in range(N):
        alone = Guides.of(voter, ids[i : i + 1], z[i : i + 1])
        assert torch.equal(alone.squares[0], whole.squares[i])
        assert torch.equal(alone.distances(moved[i : i + 1])[0], whole.distances(moved)[i])


@pytest.mark.parametrize(
    "objective", [Adaptive(), RankPair(), NeighborHinge(), ASK(mean="arithmetic", kind="instance-wise")]
)
def test_objectives_are_the_same_where_guides_are_not_copied(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.rand(120, 20, generator=generator), torch.arange(120) % 3
    x = (x + 0.15 * y[:, None]).clamp(0, 1)
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(torch.nn.Linear(20, 30)), (x, y)), 5)
    queries, labels = x[:12] * 0.98, y[:12]
    moved = (queries + 0.05 * torch.randn(queries.shape, generator=generator)).clamp(0, 1)
    bound, found = objective.bind(classifier), []
    for least in (1, 10_000):
        monkeypatch.setattr(guides, "LEAST_DIM", least)
        state = bound.start(queries, labels, None, classifier.look(queries, bound.requests))
        here = moved.clone().requires_grad_(True)
        loss = state.loss(here)
        (gradient,) = torch.autograd.grad(loss.sum(), here)
        found.append((loss.detach(), gradient))
    (near, slope), (copied, steepest) = found
    # One step and no more: votes are narrow, and a path of many steps enlarges what rounding leaves.
    assert float(steepest.norm(dim=1).max()) > 1e-3
    assert torch.allclose(near, copied, rtol=1e-3, atol=1e-4)
    assert torch.allclose(slope, steepest, rtol=1e-3, atol=1e-4 * float(steepest.abs().max()))


def test_references_made_in_inference_mode_can_be_attacked() -> None:
    with torch.inference_mode():
        held = torch.rand(60, D, generator=torch.Generator().manual_seed(5))
        references = ReferenceSet.from_vectors(
            held, torch.arange(60) % 3, features=FeatureExtractor(torch.nn.Identity())
        )
    classifier = DkNN(references, 5)
    queries = torch.rand(4, D, generator=torch.Generator().manual_seed(6))
    found = PGD(Adaptive(), steps=2)(classifier, queries, classifier.labels(queries), ThreatModel("linf", 0.1))
    assert float((found.x_adv - queries).abs().max()) > 0
