"""A classifier that searches with an index its user has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustknn import (
    ASK,
    KNN,
    PGD,
    ExactIndex,
    FaissIndex,
    FeatureExtractor,
    InputError,
    ReferenceSet,
    ThreatModel,
    evaluate,
)

faiss = pytest.importorskip("faiss")

generator = torch.Generator().manual_seed(0)
Y = torch.arange(640) % 4
X = (torch.rand(4, 1, 5, 5, generator=generator)[Y] + 0.25 * torch.randn(640, 1, 5, 5, generator=generator)).clamp(0, 1)
THREAT = ThreatModel("linf", 0.08)


@pytest.fixture(scope="module")
def references() -> ReferenceSet:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh())
    return ReferenceSet.build(FeatureExtractor(encoder), (X[:600], Y[:600]))


def faiss_index(references: ReferenceSet, description: str, metric: str = "l2") -> Any:
    rows = references.rows("(output)", torch.arange(600))
    if metric == "cosine":
        rows = nn.functional.normalize(rows, dim=1)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(16, description, kind)
    index.train(rows.numpy())
    index.add(rows.numpy())
    return index


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_a_flat_index_decides_and_is_attacked_as_the_exact_engine(references: ReferenceSet, metric: str) -> None:
    own = KNN(references, 7, metric=metric, index=FaissIndex.wrap(faiss_index(references, "Flat", metric), metric))
    usual = KNN(references, 7, metric=metric)
    assert torch.equal(own.predict(X[600:]), usual.predict(X[600:]))
    results = [PGD(steps=10)(classifier, X[600:], Y[600:], THREAT) for classifier in (own, usual)]
    assert torch.equal(results[0].success, results[1].success)
    assert 0 < float(results[0].success.double().mean()) < 1


def test_an_approximate_index_decides_by_what_it_finds(references: ReferenceSet, tmp_path: Path) -> None:
    index = faiss_index(references, "IVF8,PQ4x4")
    own = KNN(references, 7, index=FaissIndex.wrap(index))
    assert float((own.predict(X[600:]) == Y[600:]).double().mean()) > 0.5
    with pytest.raises(InputError, match="approximate"):
        PGD()(own, X[600:], Y[600:], THREAT)
    attack = PGD(objective=ASK(allow_approximate=True), steps=10)
    result = attack(own, X[600:], Y[600:], THREAT)
    assert torch.equal(result.labels[result.success], own.labels(result.x_adv)[result.success])
    assert bool(result.success.any())
    before = own.fingerprint()
    assert KNN(references, 7, index=FaissIndex.wrap(index)).fingerprint() == before
    index.nprobe = 8  # finds others: another classifier
    assert own.fingerprint() != before
    run = evaluate({"own": own}, (X[600:], Y[600:]), attacks={"ask": attack}, threat=THREAT, out=tmp_path / "run")
    assert len(run.rows(run.cells[0])["position"]) == 40


MISTAKES: dict[str, tuple[Callable[[ReferenceSet], Any], str]] = {
    "a bare faiss index": (lambda r: faiss_index(r, "Flat"), r"not IndexFlat; wrap a faiss index with FaissIndex.wrap"),
    "another metric": (
        lambda r: FaissIndex.wrap(faiss_index(r, "Flat", "ip")),
        "searches by 'ip', the classifier by 'l2'; pass metric='ip'",
    ),
    "an inner product for cosine": (
        lambda r: KNN(r, 7, metric="cosine", index=FaissIndex.wrap(faiss_index(r, "Flat", "cosine"))),
        r"wrap it with FaissIndex.wrap\(index, metric='cosine'\) if its vectors have unit length",
    ),
    "fewer": (lambda r: ExactIndex().build(r.rows("(output)", torch.arange(500))), "holds 500 vectors of length 16"),
    "another order": (
        lambda r: ExactIndex().build(r.rows("(output)", torch.arange(600).flip(0))),
        "holds other vectors than layer",
    ),
    "no index": (lambda r: 7, "must be the name of an engine or a NeighborIndex, not int"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_an_index_of_something_else_is_refused(references: ReferenceSet, what: str) -> None:
    make, message = MISTAKES[what]
    with pytest.raises(InputError, match=message):
        KNN(references, 7, index=make(references))


def test_it_is_not_saved_half(references: ReferenceSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index of your own is not saved whole"):
        KNN(references, 7, index=FaissIndex.wrap(faiss_index(references, "Flat"))).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()
