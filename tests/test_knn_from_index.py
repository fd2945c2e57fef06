"""An encoder, a faiss index and labels, put together: nothing is copied, and it is attacked like our own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustknn import ASK, KNN, PGD, FeatureExtractor, InputError, ReferenceSet, ThreatModel, evaluate
from robustknn.classifiers import knn_from_index

faiss = pytest.importorskip("faiss")

generator = torch.Generator().manual_seed(0)
Y = torch.arange(640) % 4
X = (torch.rand(4, 1, 5, 5, generator=generator)[Y] + 0.25 * torch.randn(640, 1, 5, 5, generator=generator)).clamp(0, 1)
THREAT = ThreatModel("linf", 0.08)
torch.manual_seed(0)
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh())
EMBEDDED = ENCODER(X[:600]).detach()


def index_of(description: str, metric: str = "l2") -> Any:
    rows = nn.functional.normalize(EMBEDDED, dim=1) if metric == "cosine" else EMBEDDED
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(16, description, kind)
    index.train(rows.numpy())
    index.add(rows.numpy())
    return index


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_it_is_the_classifier_of_the_same_vectors(metric: str) -> None:
    made = knn_from_index(ENCODER, index_of("Flat", metric), Y[:600], 7, metric=metric if metric == "cosine" else None)
    usual = KNN(ReferenceSet.from_vectors(EMBEDDED, Y[:600], features=FeatureExtractor(ENCODER)), 7, metric=metric)
    assert made.metric == metric
    assert torch.equal(made.predict(X[600:]), usual.predict(X[600:]))
    results = [PGD(steps=10)(c, X[600:], Y[600:], THREAT) for c in (made, usual)]
    assert torch.equal(results[0].success, results[1].success)
    assert 0 < float(results[0].success.double().mean()) < 1


def test_the_vectors_are_those_of_the_index_and_keep_it_alive() -> None:
    index = index_of("Flat")
    at = int(index.get_xb())
    made = knn_from_index(FeatureExtractor(ENCODER), index, Y[:600].numpy(), 7)
    vectors = made.references_.vectors(made.references_.layers[0])[0]
    assert vectors.data_ptr() == at
    assert made.voters[0].index.reconstruct(torch.tensor([3])).equal(EMBEDDED[3:4])
    references = made.references_
    del made, index
    gc.collect()
    other = index_of("Flat")  # takes what memory was given back
    assert int(other.get_xb()) != at
    assert torch.equal(references.rows(references.layers[0], torch.arange(600)), EMBEDDED)


def test_an_index_that_gives_its_vectors_back_needs_none() -> None:
    index = index_of("IVF8,Flat")
    index.make_direct_map()
    made = knn_from_index(ENCODER, index, Y[:600], 7)
    assert torch.equal(made.references_.rows("(output)", torch.arange(600)), EMBEDDED)
    with pytest.raises(InputError, match="allow_approximate"):
        PGD()(made, X[600:], Y[600:], THREAT)
    result = PGD(ASK(allow_approximate=True), steps=8)(made, X[600:], Y[600:], THREAT)
    assert torch.equal(result.labels, made.labels(result.x_adv))
    assert bool(result.success.any())


def test_a_compressed_index_takes_the_vectors_from_the_user(tmp_path: Path) -> None:
    index = index_of("IVF8,PQ4x4")
    with pytest.raises(InputError, match="does not give its vectors back; pass what was indexed as vectors="):
        knn_from_index(ENCODER, index, Y[:600], 7)
    np.save(tmp_path / "v.npy", EMBEDDED.numpy(), allow_pickle=False)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r+", allow_pickle=False)
    made = knn_from_index(ENCODER, index, Y[:600], 7, vectors=mapped)
    assert float((made.predict(X[600:]) == Y[600:]).double().mean()) > 0.5
    attacks = {"ask": PGD(ASK(allow_approximate=True), steps=5)}
    run = evaluate(made, (X[600:], Y[600:]), attacks=attacks, threat=THREAT, out=tmp_path / "run")
    assert len(run.rows(run.cells[1])["position"]) == 40


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"labels": Y[:599]}, "599 labels for 600 samples|599"),
    "k": ({"n_neighbors": 601}, "exceeds the 600 references"),
    "metric": ({"metric": "cosine"}, "cannot be searched by metric 'cosine'"),
    "no encoder": ({"encoder": lambda x: x}, r"must be a torch\.nn\.Module"),
    "several layers": ({"encoder": FeatureExtractor(ENCODER, ["1", "2"])}, "reads 2 layers"),
    "no index": ({"index": EMBEDDED}, r"takes a faiss\.Index, not Tensor"),
    "vectors it has": ({"vectors": EMBEDDED}, "a flat faiss index holds its vectors"),
    "other vectors": ({"index": index_of("IVF8,PQ4x4"), "vectors": EMBEDDED[:599]}, "599"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_does_not_fit_together_is_one_sentence(what: str) -> None:
    change, message = MISTAKES[what]
    parts = {"encoder": ENCODER, "index": index_of("Flat"), "labels": Y[:600], "n_neighbors": 7, **change}
    with pytest.raises(InputError, match=message):
        knn_from_index(**parts)


def test_an_encoder_of_another_width_is_refused_before_anything_runs() -> None:
    made = knn_from_index(nn.Sequential(nn.Flatten(), nn.Linear(25, 8)), index_of("Flat"), Y[:600], 7)
    with pytest.raises(InputError, match=r"features of length 8 .* the references have 16"):
        PGD()(made, X[600:], Y[600:], THREAT)
