"""Nearest neighbors on real data: the papers' networks, all references, published numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet
from robustknn.datasets import load
from robustknn.evaluation.experiment import calibration_overlap
from robustknn.models import MnistCNN, load_model
from robustknn.training import TrainConfig, accuracy, initialise, train

pytestmark = pytest.mark.data


def cifar(data_root: Path, cifar_root: Path, per_class: int | None) -> tuple[Any, KNN]:
    source = load("cifar10", root=cifar_root, protocol="published")
    model = load_model("resnet20", data_root / "models" / "resnet20-12fca82f.th")
    split = source.train if per_class is None else source.train.per_class(per_class)
    references = ReferenceSet.build(FeatureExtractor(model, model.embedding_layer), split)
    return source, KNN(references, 10)


def test_knn_of_resnet20_is_that_of_a_float64_brute_force(data_root: Path, cifar_root: Path) -> None:
    source, knn = cifar(data_root, cifar_root, per_class=100)
    x = source.test.batch(torch.arange(200))
    layer = knn.layer or knn.references_.layers[0]
    rows = knn.references_.rows(layer, torch.arange(1000)).double().numpy()
    with torch.no_grad():
        z = knn.references_.extractor()(x)[layer].double().numpy()
    distances = np.sqrt(((z[:, None] - rows) ** 2).sum(2))
    found, ids = knn.kneighbors(x)
    assert np.array_equal(np.asarray(ids), distances.argsort(1, kind="stable")[:, :10])
    np.testing.assert_allclose(np.asarray(found), np.sort(distances, 1)[:, :10], rtol=1e-5)
    theirs = KNeighborsClassifier(10, algorithm="brute").fit(rows, knn.references_.labels.numpy())
    assert np.array_equal(np.asarray(knn.predict(x)), theirs.predict(z))
    assert knn.score(x, source.test.labels[:200]) > 0.85


@pytest.mark.slow
def test_knn_of_resnet20_over_all_references_and_test_images(data_root: Path, cifar_root: Path) -> None:
    source, knn = cifar(data_root, cifar_root, per_class=None)
    assert len(knn.references_) == 50_000
    right = sum(
        int((torch.as_tensor(knn.predict(source.test.batch(part))) == source.test.labels[part]).sum())
        for part in torch.arange(10_000).split(500)
    )
    assert right / 100 == pytest.approx(91.7, abs=0.7)  # as the network's own head, 91.73 %


@pytest.mark.slow
def test_the_mnist_network_and_its_neighbors_reach_the_published_accuracy(data_root: Path) -> None:
    """Table 2 of arXiv 1911.06591: CNN 99.17, kNN 98.98, DkNN 98.89; half an hour on one core, 6 GB of memory."""
    source = load("mnist", root=data_root, protocol="published")
    model = initialise(MnistCNN, 0)
    train(model, source, TrainConfig(epochs=18, batch_size=128, lr=1e-3, seed=0))
    held_out = torch.ones(10_000, dtype=torch.bool)
    held_out[calibration_overlap(source, source.test)] = False
    rest = source.test.subset(held_out.nonzero()[:, 0])
    assert len(rest) == 9250
    assert 100 * accuracy(model, rest) == pytest.approx(99.17, abs=0.3)
    references = ReferenceSet.build(FeatureExtractor(model, model.feature_layers), source.train)
    assert len(references) == 60_000
    dknn = DkNN(references, 75, metric="cosine").calibrate(source.calibration)
    knn = KNN(references, 75, layer=model.embedding_layer, metric="cosine")
    for classifier, published in ((knn, 98.98), (dknn, 98.89)):
        right = sum(
            int((torch.as_tensor(classifier.predict(rest.batch(part))) == rest.labels[part]).sum())
            for part in torch.arange(9250).split(250)
        )
        assert 100 * right / 9250 == pytest.approx(published, abs=0.3)
