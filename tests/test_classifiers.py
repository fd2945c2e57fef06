"""KNN, the rule of votes and what all classifiers on references share, against scikit-learn and plain loops."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mutate import mutations, replaced
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from robustknn import (
    KNN,
    DkNN,
    ExactIndex,
    FeatureExtractor,
    InputError,
    IntegrityError,
    ReferenceSet,
    load_classifier,
    registry,
)
from robustknn.classifiers import (
    TIE,
    NeighborEstimator,
    Request,
    Voter,
    Votes,
    VoteShare,
    decide,
    margin,
    strictly_lost,
    strictly_won,
)
from robustknn.neighbors import Neighbors

Array = np.ndarray[Any, Any]


def points(n: int, dim: int = 6, seed: int = 0, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(dtype)


def brute_force(references: Array, queries: Array, metric: str) -> tuple[Array, Array]:
    """All distances in float64, and the order by (distance, id)."""
    r, q = references.astype(np.float64), queries.astype(np.float64)
    if metric == "l2":
        distances = np.sqrt(((q[:, None] - r[None]) ** 2).sum(2))
    else:
        product = q @ r.T
        length = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(r, axis=1)
        distances = -product if metric == "ip" else 1 - product / length
    return distances, np.argsort(distances, axis=1, kind="stable")


def votes_by_hand(order: Array, labels: Array, k: int, n_classes: int) -> Array:
    return np.stack([[np.sum(labels[row[:k]] == c) for c in range(n_classes)] for row in order])


# ------------------------------------------------------------------------------------------ against scikit-learn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("n", "k", "n_classes"), [(200, 1, 2), (200, 5, 3), (300, 75, 100), (60, 60, 4)])
def test_knn_is_scikit_learns(n: int, k: int, n_classes: int, metric: str, dtype: Any) -> None:
    x, y, queries = points(n, dtype=dtype), np.arange(n) % n_classes, points(50, seed=1, dtype=dtype)
    ours = KNN(n_neighbors=k, metric=metric).fit(x, y)
    theirs = KNeighborsClassifier(k, algorithm="brute", metric="euclidean" if metric == "l2" else metric)
    theirs.fit(x.astype(np.float64), y)
    distances, ids = ours.kneighbors(queries)
    their_distances, their_ids = theirs.kneighbors(queries.astype(np.float64))
    assert np.array_equal(ids, their_ids)
    assert distances.dtype == dtype
    assert np.allclose(distances, their_distances, rtol=1e-5, atol=1e-6 if dtype == np.float32 else 1e-12)
    assert np.array_equal(ours.predict(queries), theirs.predict(queries.astype(np.float64)))
    assert np.allclose(ours.predict_proba(queries), theirs.predict_proba(queries.astype(np.float64)), atol=1e-12)
    assert np.array_equal(ours.kneighbors(queries, 3, return_distance=False), their_ids[:, :3] if k > 2 else
                          brute_force(x, queries, metric)[1][:, :3])  # fmt: skip
    assert ours.score(queries, theirs.predict(queries.astype(np.float64))) == 1.0


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_knn_on_digits_orders_equal_distances_by_id(metric: str, k: int) -> None:
    x, y = load_digits(return_X_y=True)  # whole numbers: equal distances do occur
    x, y, queries, truth = x[:900], y[:900], x[900:1300], y[900:1300]
    ours = KNN(n_neighbors=k, metric=metric).fit(x.astype(np.float32), y)
    every, order = brute_force(x, queries, metric)
    distances, ids = ours.kneighbors(queries.astype(np.float32))
    nearest = np.take_along_axis(every, order[:, : k + 1], 1)
    assert np.allclose(distances, nearest[:, :k], rtol=1e-5, atol=1e-6)
    if metric != "cosine":  # products of whole numbers are exact, so that ties are known
        assert k == 1 or (nearest[:, 1:] == nearest[:, :-1]).any()
        assert np.array_equal(ids, order[:, :k])
    else:
        apart = np.abs(nearest[:, 1:] - nearest[:, :-1]).min(1) > 1e-6
        assert apart.mean() > 0.9
        assert np.array_equal(ids[apart], order[apart, :k])
    sure = nearest[:, k] - nearest[:, k - 1] > 1e-6
    by_hand = votes_by_hand(order, y, k, 10).argmax(1)
    assert np.array_equal(ours.predict(queries.astype(np.float32))[sure], by_hand[sure])
    if metric != "ip":
        theirs = KNeighborsClassifier(k, algorithm="brute", metric="euclidean" if metric == "l2" else metric)
        assert np.array_equal(theirs.fit(x, y).predict(queries)[sure], by_hand[sure])
        assert ours.score(queries.astype(np.float32), truth) > 0.93


def test_a_layer_of_a_network_is_searched() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y, queries = points(120), np.arange(120) % 3, points(30, seed=1)
    w, b = net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    features, wanted = np.tanh(x @ w.T + b), np.tanh(queries @ w.T + b)
    references = ReferenceSet.build(FeatureExtractor(net, ["1", "2"]), (x, y))
    ours = KNN(references, 7, layer="1")
    every, order = brute_force(features, wanted, "l2")
    distances, ids = ours.kneighbors(queries)
    assert np.array_equal(ids, order[:, :7])
    assert np.allclose(distances, np.take_along_axis(every, order[:, :7], 1), atol=1e-12)
    assert np.array_equal(ours.predict(queries), votes_by_hand(order, y, 7, 3).argmax(1))
    fitted = KNN(n_neighbors=7, layer="1", features=FeatureExtractor(net, ["1", "2"])).fit(x, y)
    assert np.array_equal(fitted.kneighbors(queries)[1], ids)
    assert fitted.extractor is not None
    assert fitted.extractor.layers == ("1",)  # only what votes is read


# ------------------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("scores", "label", "margins", "lost", "won"),
    [
        ([0.2, 0.5, 0.3], 1, [-0.3, 0.2, -0.2], [True, False, True], [False, True, False]),
        ([0.4, 0.2, 0.4], 0, [0.0, -0.2, 0.0], [False, True, False], [False, False, False]),  # tied: the smallest
        ([0.2, 0.4, 0.4], 1, [-0.2, 0.0, 0.0], [True, False, False], [False, False, False]),
        ([0.4, 0.4 + 0.9 * TIE, 0.2], 0, None, [False, False, True], [False, False, False]),  # within a tie
        ([0.4, 0.4 + 2 * TIE, 0.2], 1, None, [True, False, True], [False, True, False]),  # beyond a tie
        ([0.0, 0.0, 0.0], 0, [0, 0, 0], [False] * 3, [False] * 3),
        ([1.0], 0, [float("inf")], [False], [True]),
    ],
)
def test_ties_fall_to_the_smallest_class_and_are_no_success(
    scores: list[float], label: int, margins: list[float] | None, lost: list[bool], won: list[bool]
) -> None:
    n = len(scores)
    rows, each = torch.tensor([scores] * n, dtype=torch.float64), torch.arange(n)
    assert decide(rows).tolist() == [label] * n
    if margins is not None:
        assert margin(rows, each).tolist() == pytest.approx(margins)
    assert strictly_lost(rows, each).tolist() == lost
    assert strictly_won(rows, each).tolist() == won


def test_tied_votes_are_decided_for_the_smallest_class() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    ours = KNN(n_neighbors=4).fit(x, ["b", "a", "a", "b"])
    assert ours.predict([[0.0], [11.0]]).tolist() == ["a", "a"]
    third = KNN(n_neighbors=3).fit(np.array([[0.0], [0.1], [0.2]]), [2, 1, 0])  # 1/3 each, three times added up
    assert third.predict([[5.0]]).tolist() == [0]


def test_the_rule_counts_weights_and_is_differentiable() -> None:
    weights = [torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True), torch.tensor([[0.25, 1.0]], requires_grad=True)]
    labels = [torch.tensor([[0, 2, 2]]), torch.tensor([[2, 2]])]
    votes = [Votes(w, torch.zeros_like(w), t, w.shape[1]) for w, t in zip(weights, labels, strict=True)]
    scores = VoteShare()(votes, 4)
    assert torch.allclose(scores, torch.tensor([[1 / 5, 0, 1.75 / 5, 0]]))
    scores[0, 2].backward()
    for place, expected in enumerate(([0, 0.2, 0.2], [0.2, 0.2])):
        gradient = weights[place].grad
        assert gradient is not None
        assert gradient[0].tolist() == pytest.approx(expected)


class Forgetful(ExactIndex):
    """An approximate index that finds only the first `found` neighbors of each query."""

    exact: ClassVar[bool] = False
    found: ClassVar[int] = 3

    def search(self, queries: Tensor, k: int) -> Neighbors:
        near = super().search(queries, k)
        missing = torch.arange(k) >= self.found
        return Neighbors(near.distances.masked_fill(missing, torch.inf), near.ids.masked_fill(missing, -1))


@pytest.fixture
def forgetful() -> Iterator[type[Forgetful]]:
    registry.indexes.register("forgetful", "for a test")(Forgetful)
    yield Forgetful
    registry.indexes._entries.pop("forgetful")
    Forgetful.found = 3


@pytest.mark.parametrize("found", [0, 1, 3])
@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_missing_neighbors_never_vote(forgetful: type[Forgetful], kind: type[NeighborEstimator], found: int) -> None:
    forgetful.found = found
    x, y, queries = points(40), np.arange(40) % 3, points(20, seed=1)  # id −1 would be a vote of the last reference
    ours = kind(n_neighbors=5, index="forgetful").fit(x, y)  # type: ignore[call-arg]
    _, order = brute_force(x, queries, "l2")
    counts = votes_by_hand(order, y, found, 3)
    assert torch.allclose(ours.scores(torch.from_numpy(queries)), torch.from_numpy(counts / 5))
    assert np.array_equal(ours.predict(queries), counts.argmax(1))
    shares = ours.predict_proba(queries)
    assert np.allclose(shares, counts / found if found else 1 / 3)
    voter = ours.voters[0]
    assert voter.labels_of(torch.tensor([[-1, 4]])).tolist() == [[0, 1]]  # never −1


# ------------------------------------------------------------------------------------------------ inputs and modes


@pytest.mark.parametrize("shape", [(7,), (2, 9), (3, 4, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_raw_inputs_of_any_shape_are_compared_flattened(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(2)
    x, queries = (rng.normal(size=(n, *shape)).astype(dtype) for n in (50, 21))
    y = np.arange(50) % 3
    ours = KNN(n_neighbors=5).fit(x, y)
    _, order = brute_force(x.reshape(50, -1), queries.reshape(21, -1), "l2")
    assert np.array_equal(ours.kneighbors(queries)[1], order[:, :5])
    assert ours.references_.vectors("(output)")[0].numpy().dtype == dtype
    tensors = KNN(n_neighbors=5).fit(torch.from_numpy(x), torch.from_numpy(y))
    assert np.array_equal(tensors.kneighbors(torch.from_numpy(queries))[1].numpy(), order[:, :5])
    other = np.float64 if dtype == np.float32 else np.float32
    assert np.array_equal(ours.predict(queries.astype(other)), ours.predict(queries))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def on_a_net(kind: type[NeighborEstimator] = KNN, k: int = 5, **settings: Any) -> NeighborEstimator:
    data = points(80, dtype=np.float32), np.arange(80) % 4
    references = ReferenceSet.build(FeatureExtractor(small_net(), ["1"]), data)
    return kind(references, k, **settings)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_tensors_give_tensors_and_arrays_give_arrays(kind: type[NeighborEstimator]) -> None:
    ours = on_a_net(kind)
    queries = points(9, seed=1, dtype=np.float32)
    for call in (ours.predict, ours.predict_proba):
        plain, tensor = call(queries), call(torch.from_numpy(queries))
        assert isinstance(plain, np.ndarray)
        assert isinstance(tensor, Tensor)
        assert np.array_equal(plain, tensor.numpy())
        assert np.array_equal(plain, call(queries.tolist() if call == ours.predict else queries.astype(np.float64)))
    assert ours.score(queries, ours.predict(queries)) == 1.0
    assert ours.score(torch.from_numpy(queries), torch.from_numpy(ours.predict(queries))) == 1.0
    assert torch.equal(ours.labels(torch.from_numpy(queries)), torch.from_numpy(ours.predict(queries)))


@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_nothing_depends_on_the_batch_or_on_the_gradient_mode(kind: type[NeighborEstimator]) -> None:
    ours = on_a_net(kind)
    queries = torch.from_numpy(points(37, seed=1, dtype=np.float32))
    scores, distances = ours.scores(queries), ours.look(queries).nearest[ours.voters[0]].distances
    assert scores.dtype == torch.float64
    for size in (1, 2, 4, 36):
        ours.set_params(batch_size=size)
        assert torch.equal(ours.predict(queries), decide(scores))
        assert torch.equal(ours.predict_proba(queries), scores)
    for row in (0, 4, 36):  # one alone
        one = ours.look(queries[row : row + 1])
        assert torch.equal(one.scores, scores[row : row + 1])
        assert torch.equal(one.nearest[ours.voters[0]].distances, distances[row : row + 1])
    for mode in (torch.no_grad, torch.inference_mode, nullcontext):
        with mode():
            again = ours.scores(queries.clone().requires_grad_(mode is nullcontext))
        assert torch.equal(again, scores)
        assert not again.requires_grad


def test_features_read_for_an_attack_are_differentiable() -> None:
    ours = on_a_net()
    x = torch.from_numpy(points(3, seed=1, dtype=np.float32)).requires_grad_()
    (gradient,) = torch.autograd.grad(ours.read(x, ["1"])["1"].sum(), x)
    net = small_net()
    (by_hand,) = torch.autograd.grad(torch.tanh(net[0](x)).sum(), x)
    assert torch.allclose(gradient, by_hand, atol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["cat", "ant", "bee"]),
        np.array(["cat", "ant", "bee"], dtype=object),
        np.array([7, -3, 1000]),
        np.array([2.0, 1.0, 5.0]),
        np.array([3, 1, 2], dtype=np.uint8),
        np.array([True, False, True]),
    ],
    ids=["text", "objects", "gaps", "floats", "uint8", "bool"],
)
def test_labels_may_be_anything_that_can_be_ordered(labels: Array) -> None:
    x, queries = points(60), points(30, seed=1)
    y = labels[np.arange(60) % 3]
    ours = KNN(n_neighbors=5).fit(x, y)
    theirs = KNeighborsClassifier(5, algorithm="brute").fit(x, y)
    assert ours.classes_.dtype == y.dtype
    assert np.array_equal(ours.classes_, theirs.classes_)
    assert np.array_equal(ours.predict(queries), theirs.predict(queries))
    assert ours.score(queries, theirs.predict(queries)) == 1.0
    tensors = torch.from_numpy(queries)
    codes = np.searchsorted(np.unique(labels), theirs.predict(queries))
    assert np.array_equal(ours.labels(tensors).numpy(), codes)  # attacks see numbers
    if np.issubdtype(labels.dtype, np.integer):
        assert np.array_equal(ours.predict(tensors).numpy(), theirs.predict(queries))
    else:
        assert np.array_equal(ours.predict(tensors).numpy(), codes)
    assert ours.score(tensors, theirs.predict(queries)) == 1.0


# -------------------------------------------------------------------------------------------------- parts and looks


def test_the_index_searches_the_storage_of_the_references() -> None:
    references = ReferenceSet.build(
        FeatureExtractor(small_net(), ["1", "2"]), (points(80, dtype=np.float32), [0, 1] * 40)
    )
    one, two = KNN(references, 5, layer="1"), DkNN(references, 9, layers=["1"])
    pointers = {c.voters[0].index.vectors.data_ptr() for c in (one, two)}  # type: ignore[attr-defined]
    assert pointers == {references.vectors("1")[0].data_ptr()}
    voters = one.voters
    assert one.voters is voters  # made once
    one.set_params(n_neighbors=6)
    assert one.voters[0].n_neighbors == 6
    assert one.voters[0].metric == "l2"


def test_a_look_holds_the_decision_and_what_was_asked_besides() -> None:
    ours = on_a_net(DkNN, 5)
    x = torch.from_numpy(points(12, seed=1, dtype=np.float32))
    voter = ours.voters[0]
    other = ours.other_voter(ours.references_, "1", 3, "cosine")
    assert ours.other_voter(ours.references_, "1", 3, "cosine") is other
    plain = ours.look(x)
    rich = ours.look(x, [Request(voter, nearest=9), Request(voter, per_class=2), Request(other, nearest=4)])
    assert torch.equal(plain.scores, rich.scores)
    assert plain.nearest[voter].ids.shape == (12, 5)
    assert rich.nearest[voter].ids.shape == (12, 9)
    assert torch.equal(rich.nearest[voter].ids[:, :5], plain.nearest[voter].ids)
    assert rich.nearest[other].ids.shape == (12, 4)
    assert torch.equal(decide(rich.scores), decide(plain.scores))
    features, wanted = ours.references_.vectors("1")[0].numpy(), rich.features["1"].numpy()
    every, order = brute_force(features, wanted, "l2")
    labels = ours.references_.labels.numpy()
    for row in range(12):
        for c in range(4):
            nearest = [i for i in order[row] if labels[i] == c][:2]
            assert rich.by_class[voter].ids[row, c].tolist() == nearest
            assert np.allclose(rich.by_class[voter].distances[row, c], every[row, nearest], atol=1e-4)
    assert np.array_equal(rich.nearest[other].ids.numpy(), brute_force(features, wanted, "cosine")[1][:, :4])
    rows = torch.tensor([7, 2])
    part = rich.select(rows)
    assert torch.equal(part.scores, rich.scores[rows])
    assert torch.equal(part.features["1"], rich.features["1"][rows])
    assert torch.equal(part.nearest[other].ids, rich.nearest[other].ids[rows])
    assert torch.equal(part.by_class[voter].ids, rich.by_class[voter].ids[rows])


def test_copies_share_the_references_and_pickles_hold_them_once() -> None:
    ours = on_a_net(DkNN)
    queries = points(9, seed=1, dtype=np.float32)
    expected = ours.predict(queries)
    twin = copy.deepcopy(ours)
    assert twin.references is ours.references
    assert np.array_equal(twin.predict(queries), expected)
    vectors = ours.references_.vectors("1")[0]
    assert twin.voters[0].index.vectors.data_ptr() == vectors.data_ptr()  # type: ignore[attr-defined]
    large = KNN(ReferenceSet.from_vectors(torch.randn(1000, 250), torch.arange(1000) % 2))
    assert large.voters
    stream = pickle.dumps(large)
    assert len(stream) < 1.1 * 1000 * 250 * 4
    assert np.array_equal(pickle.loads(pickle.dumps(ours)).predict(queries), expected)  # noqa: S301 - our own bytes


def test_moving_rebuilds_what_stands_on_the_references() -> None:
    ours = on_a_net()
    queries = points(9, seed=1, dtype=np.float32)
    expected = ours.predict_proba(queries)
    assert ours.to("cpu") is ours
    assert np.array_equal(ours.predict_proba(queries), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: there is no CUDA device")
@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_a_gpu_decides_alike(kind: type[NeighborEstimator]) -> None:
    ours, queries = on_a_net(kind), points(30, seed=1, dtype=np.float32)
    sharing = kind(ours.references_, 5)  # type: ignore[call-arg]
    expected = ours.predict(queries)
    assert np.array_equal(ours.to("cuda").predict(queries), expected)
    assert np.array_equal(sharing.predict(queries), expected)  # its references have moved as well
    assert ours.predict(torch.from_numpy(queries)).device.type == "cuda"
    assert np.array_equal(ours.to("cpu").predict(queries), expected)


# ------------------------------------------------------------------------------------------------- one sentence


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: on_a_net(k=0), "n_neighbors must be a whole number of at least 1, not 0"),
        (lambda: on_a_net(k=2.5), "n_neighbors must be a whole number"),  # type: ignore[arg-type]
        (lambda: on_a_net(k=81), "n_neighbors = 81 exceeds the 80 references"),
        (lambda: on_a_net(metric="l3"), "metric must be one of 'l2', 'cosine', 'ip', not 'l3'"),
        (lambda: on_a_net(layer="11"), "unknown reference layer '11'; did you mean '1'"),
        (lambda: on_a_net(DkNN, layers=["1", "9"]), "unknown reference layer '9'"),
        (lambda: on_a_net(index="exakt"), "unknown index 'exakt'; did you mean 'exact'"),
        (lambda: on_a_net(batch_size=0), "batch_size must be a whole number"),
        (lambda: KNN(points(3)).predict(points(3)), "references must be a ReferenceSet, not ndarray"),  # type: ignore[arg-type]
        (lambda: on_a_net().set_params(n_neighbor=3), "did you mean 'n_neighbors'"),
        (lambda: on_a_net().set_params(n_neighbors=90).predict(points(3)), "exceeds the 80 references"),
        (lambda: KNN(n_neighbors=90).fit(points(80), np.arange(80) % 2), "exceeds the n_samples = 80 references"),
        (lambda: KNN(n_neighbors=2).fit(torch.zeros(5, 2), torch.arange(4)), "4 labels for 5 samples"),
        (lambda: on_a_net().predict(points(3, 7)), r"cannot run on inputs of shape \(3, 7\)"),
        (lambda: on_a_net().predict(points(3)[0]), r"has shape \(6,\); pass a batch"),
        (lambda: on_a_net().predict(points(3).astype(int)), "convert it to floating point first"),
        (lambda: on_a_net().predict(points(3) * np.nan), "NaN or infinite"),
        (lambda: on_a_net().predict(torch.zeros(0, 6)), "at least one sample"),
        (lambda: on_a_net().score(points(3), [0, 1]), r"y has shape \(2,\) for 3 samples"),
        (lambda: on_a_net().kneighbors(points(3), 81), "k = 81 neighbors were asked of 80 references"),  # type: ignore[attr-defined]
        (lambda: on_a_net().kneighbors(points(3), 0), "n_neighbors must be a whole number"),  # type: ignore[attr-defined]
        (
            lambda: KNN().fit(points(80), np.arange(80) % 2).predict(points(3, 7)),
            "X has 7 features, but KNN is expecting 6",
        ),
        (
            lambda: KNN().fit(torch.rand(80, 6), torch.arange(80) % 2).predict(torch.rand(3, 7)),
            r"inputs of shape \(7,\) give features of length 7 at layer '\(output\)', the references have 6;",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_several_layers_need_a_choice() -> None:
    references = ReferenceSet.build(
        FeatureExtractor(small_net(), ["1", "2"]), (points(8, dtype=np.float32), [0, 1] * 4)
    )
    with pytest.raises(InputError, match=r"hold 2 layers \(1, 2\); choose one \(layer=, --layer\), or use DkNN"):
        KNN(references, 3)
    assert KNN(references, 3, layer="2").voters[0].layer == "2"


def test_inputs_of_another_size_at_a_layer_that_takes_any() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    references = ReferenceSet.build(FeatureExtractor(net, "0"), (torch.rand(20, 1, 6, 6), torch.arange(20) % 2))
    with pytest.raises(
        InputError, match=r"shape \(1, 8, 8\) give features of length 72 at layer '0', .* have 32; pass"
    ):
        KNN(references, 3).predict(torch.rand(4, 1, 8, 8))


def test_references_without_a_model_cannot_classify_until_they_are_given_one() -> None:
    net, x, y = small_net(), points(80, dtype=np.float32), np.arange(80) % 4
    with torch.no_grad():
        embeddings = torch.tanh(net[0](torch.from_numpy(x)))
    bare = KNN(ReferenceSet.from_vectors(embeddings, y))
    for call in (bare.predict, bare.predict_proba, bare.kneighbors):
        with pytest.raises(InputError, match="knows no model, so no input can be classified; give it features="):
            call(x)
    with_model = KNN(ReferenceSet.from_vectors(embeddings, y, features=FeatureExtractor(net, "1")))
    assert np.array_equal(with_model.predict(x[:20]), on_a_net().predict(x[:20]))
    assert len(bare.fingerprint()) == 64


# ----------------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_saved_and_loaded_it_decides_the_same_to_the_last_bit(
    tmp_path: Path, kind: type[NeighborEstimator], metric: str, mapped: bool
) -> None:
    ours = on_a_net(kind, 7, metric=metric)
    queries = points(25, seed=1, dtype=np.float32)
    ours.save(tmp_path / "saved")
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".npy", ".json", "")]
    for model in (small_net(), FeatureExtractor(small_net(), ["1"])):
        for loaded in (
            load_classifier(tmp_path / "saved", model, mapped),
            kind.load(tmp_path / "saved", model, mapped),
        ):
            assert type(loaded) is kind
            assert loaded.settings() == ours.settings()
            assert np.array_equal(loaded.predict_proba(queries), ours.predict_proba(queries))
            for a, b in zip(neighbors_of(loaded, queries), neighbors_of(ours, queries), strict=True):
                assert np.array_equal(a, b)
            assert loaded.fingerprint() == ours.fingerprint()


def neighbors_of(classifier: Any, queries: Array) -> tuple[Array, Array]:
    found = classifier.kneighbors(queries)
    return found["1"] if isinstance(found, dict) else found


def test_two_metrics_over_one_set_are_saved_alike(tmp_path: Path) -> None:
    references = on_a_net().references_
    queries = points(25, seed=1, dtype=np.float32)
    both = {"cosine": KNN(references, 5, metric="cosine"), "l2": KNN(references, 5)}
    for name, ours in both.items():
        ours.save(tmp_path / name)
        loaded = KNN.load(tmp_path / name, small_net())
        assert loaded.fingerprint() == ours.fingerprint()
        assert np.array_equal(loaded.kneighbors(queries)[0], ours.kneighbors(queries)[0])
    # The order in which they were made changes no fingerprint.
    assert on_a_net().fingerprint() == both["l2"].fingerprint()
    assert on_a_net(metric="cosine").fingerprint() == both["cosine"].fingerprint()


@pytest.mark.parametrize(
    "labels",
    [np.array(["b", "a"]), np.array(["b", "a"], dtype=object), np.array([9, -2])],
    ids=["text", "objects", "numbers"],
)
def test_fitted_on_raw_inputs_it_is_loaded_without_a_model(tmp_path: Path, labels: Array) -> None:
    x, y, queries = points(40), labels[np.arange(40) % 2], points(9, seed=1)
    ours = KNN(n_neighbors=np.int64(3)).fit(x, y)  # type: ignore[arg-type]
    ours.save(tmp_path / "saved")
    loaded = KNN.load(tmp_path / "saved")
    assert loaded.predict(queries).tolist() == ours.predict(queries).tolist()
    assert loaded.classes_.tolist() == ours.classes_.tolist()
    assert loaded.fingerprint() == ours.fingerprint()
    with pytest.raises(InputError, match="class labels of type float64 cannot be saved"):
        KNN(n_neighbors=3).fit(x, (np.arange(40) % 2) + 0.0).save(tmp_path / "floats")


def other_weight() -> nn.Sequential:
    net = small_net()
    net[2].bias.data[0] += 1e-6  # behind the layer that votes: another model all the same
    return net


def test_another_model_kind_or_set_is_refused(tmp_path: Path) -> None:
    on_a_net().save(tmp_path / "knn")
    on_a_net(DkNN).save(tmp_path / "dknn")
    with pytest.raises(IntegrityError, match="made with another model"):
        KNN.load(tmp_path / "knn", other_weight())
    with pytest.raises(IntegrityError, match="holds a DkNN, not a KNN"):
        KNN.load(tmp_path / "dknn", small_net())
    with pytest.raises(IntegrityError, match="does not exist or is not a file"):
        load_classifier(tmp_path / "nothing", small_net())
    with pytest.raises(InputError, match="exists"):
        on_a_net().save(tmp_path / "knn")
    on_a_net(k=9).save(tmp_path / "knn", overwrite=True)
    assert KNN.load(tmp_path / "knn", small_net()).n_neighbors == 9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a classifier of ours; it is not overwritten"):
        on_a_net().save(tmp_path / "mine", overwrite=True)
    # References of the same model, but others.
    data = points(80, seed=8, dtype=np.float32), np.arange(80) % 4
    swapped = ReferenceSet.build(FeatureExtractor(small_net(), ["1"]), data)
    swapped.save(tmp_path / "knn" / "references", overwrite=True)
    with pytest.raises(IntegrityError, match="not those the classifier was saved with"):
        KNN.load(tmp_path / "knn", small_net())


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    ours = on_a_net(DkNN)
    ours.save(tmp_path / "saved")
    file, net = tmp_path / "saved" / "classifier.json", small_net()
    for data in mutations(file.read_bytes(), 10_000, seed=2, splices=[b"null", b"1e999", b'"knn"', b"[", b"{}"]):
        with replaced(file, data), pytest.raises(IntegrityError) as caught:
            load_classifier(tmp_path / "saved", net)
        assert "\n" not in str(caught.value)
    content = json.loads(file.read_text())
    for change in ({"type": "knn"}, {"settings": {**content["settings"], "n_neighbors": 6}}, {"references": "0" * 64}):
        data = json.dumps({**content, **change}, indent=1, sort_keys=True).encode()
        with replaced(file, data), pytest.raises(IntegrityError, match="altered"):
            load_classifier(tmp_path / "saved", net)
    assert load_classifier(tmp_path / "saved", net).fingerprint() == ours.fingerprint()


def test_fingerprint_changes_with_all_that_decides_and_nothing_else() -> None:
    base = on_a_net(DkNN).fingerprint()
    assert on_a_net(DkNN, batch_size=7).fingerprint() == base
    assert on_a_net(DkNN, np.int64(5)).fingerprint() == base  # type: ignore[arg-type]
    calibrated = on_a_net(DkNN)
    calibrated.calibrate(points(9, seed=3), np.arange(9) % 4)  # type: ignore[attr-defined]
    trained = on_a_net(DkNN)
    next(trained.references_.extractor().model.parameters()).data[0, 0] += 1e-3  # after the references were made
    prints = [
        base,
        on_a_net().fingerprint(),
        on_a_net(DkNN, 6).fingerprint(),
        on_a_net(DkNN, metric="cosine").fingerprint(),
        on_a_net(DkNN, comparison=">").fingerprint(),
        on_a_net(DkNN, correction="conformal").fingerprint(),
        calibrated.fingerprint(),
        trained.fingerprint(),
    ]
    assert len(set(prints)) == len(prints)


def test_repr_shows_the_parameters() -> None:
    assert repr(KNN(n_neighbors=3)) == "KNN(n_neighbors=3, metric='l2', index='exact')"
    assert repr(on_a_net(k=3)).startswith(
        "KNN(references=ReferenceSet(80 references, 4 classes, {1: 8}), n_neighbors=3"
    )


def test_a_voter_says_what_it_searches() -> None:
    voter = Voter.make(on_a_net().references_, "1@0", 3, "cosine")
    assert (voter.layer, voter.metric, voter.n_neighbors) == ("1", "cosine", 3)
    assert np.allclose(voter.index.vectors.norm(dim=1), 1, atol=1e-6)  # type: ignore[attr-defined]
