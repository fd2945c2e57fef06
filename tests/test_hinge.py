"""Sitawarin & Wagner's hinge against its formula written out in NumPy, one guide at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sides_by_hand import nearest_of, other_class, sphere
from small import random_classifier
from torch import Tensor

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks import PGD
from robustknn.objectives import NeighborHinge
from robustknn.objectives.hinge import MARGIN, Narrowing
from robustknn.recipes import sw2_published


def by_hand(
    config: NeighborHinge,
    classifier: DkNN,
    x0: Tensor,
    x: Tensor,
    y: int,
    target: int | None = None,
    share: float = 1.0,
) -> float:
    """The loss of one input whose guides were looked up at x0: loops over layers and guides."""
    references, metric, k = classifier.references_, classifier.metric, classifier.n_neighbors
    layers, labels, ids = references.layers, references.labels.numpy(), torch.arange(len(references))
    rows = {v: references.rows(v, ids).numpy() for v in layers}
    with torch.no_grad():
        start = {v: z[0].numpy() for v, z in references.extractor()(x0[None]).items()}
        here = {v: z[0].numpy() for v, z in references.extractor()(x[None]).items()}
    own, m = y if target is None else target, k if config.n_guides is None else config.n_guides // 2
    asked = layers[:1] if config.guide_layer == "first" else layers
    other = other_class([(start[v], rows[v]) for v in asked], labels, own, m, metric)
    least = min(m, math.ceil((k + 1) / 2))
    count = math.ceil(least + share * (m - least))
    total, side = 0.0, 1.0 if target is None else -1.0
    for layer in layers:
        eta = np.sort([sphere(start[layer], r, metric) ** 2 for r in rows[layer]])[k - 1]
        unit = eta if config.scale == "radius" else 1.0
        chosen_in = layers[0] if config.guide_layer == "first" else layer
        for c, t in ((own, -side), (other, side)):
            for j in nearest_of(start[chosen_in], rows[chosen_in], labels, c, m, metric)[:count]:
                squared = sphere(here[layer], rows[layer][j], metric) ** 2
                total -= max(0.0, t * (squared - eta) / unit + 1e-5)
    return float(total)


FORMS = [
    NeighborHinge(),
    NeighborHinge(scale="none"),
    NeighborHinge(n_guides=16),
    NeighborHinge(guide_layer="first"),
    NeighborHinge.published(12),
]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_every_form_equals_the_formula(config: NeighborHinge, metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    bound, x = config.bind(classifier), x0 + 0.05
    for target in (None, (y + 1) % 4):
        got = bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)
        aims = [None] * len(y) if target is None else target.tolist()
        want = [by_hand(config, classifier, x0[i], x[i], int(y[i]), aims[i]) for i in range(len(x))]
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_gradients_by_finite_differences(config: NeighborHinge) -> None:
    classifier, x0, y = random_classifier()
    bound = config.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, ((x0 + 0.05).requires_grad_(True),))


def test_fewer_guides_are_asked_for_after_a_success() -> None:
    """m/2 falls from k to the votes a majority needs, sample by sample, and goes with the samples that are kept."""
    classifier, x0, y = random_classifier(k=9)
    config, share = NeighborHinge(), torch.linspace(0, 1, len(y))
    bound = config.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert isinstance(batch, Narrowing)
    batch.narrow(share)
    want = [by_hand(config, classifier, x0[i], x0[i], int(y[i]), None, float(share[i])) for i in range(len(y))]
    assert batch.loss(x0).tolist() == pytest.approx(want, rel=1e-6)
    kept = torch.tensor([11, 0, 5])
    batch.update(kept, classifier.look(x0[kept], bound.requests))
    assert batch.loss(x0[kept]).tolist() == pytest.approx([want[i] for i in kept.tolist()], rel=1e-6)
    full = [by_hand(config, classifier, x0[i], x0[i], int(y[i])) for i in range(len(y))]
    assert any(abs(a - b) > 1e-3 for a, b in zip(full, want, strict=True))


def test_zero_loss_means_that_the_ball_belongs_to_the_other_class() -> None:
    """Ten references of each of two classes around two points, k = 3: nothing is asked for in the other's midst."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.2, 0.2], [0.8, 0.8]], dtype=torch.float64)
    y = torch.arange(20) % 2
    vectors = centers[y] + 0.02 * torch.rand(20, 2, generator=generator, dtype=torch.float64)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(torch.nn.Identity()), (vectors, y)), 3)
    bound = NeighborHinge().bind(classifier)
    inside = vectors[1:2]  # of class 1
    lost = bound.start(inside, torch.tensor([0]), None, classifier.look(inside, bound.requests)).loss(inside)
    held = bound.start(inside, torch.tensor([1]), None, classifier.look(inside, bound.requests)).loss(inside)
    assert -10 * MARGIN <= float(lost) <= 0
    assert float(held) < -1


def test_inner_products_are_attacked_too() -> None:
    classifier, x0, y = random_classifier(metric="ip", n=200)
    x, y = x0.float(), classifier.labels(x0)
    result = PGD(NeighborHinge(), steps=40, check_every=1)(classifier, x.double(), y, ThreatModel("l2", 1.0))
    assert float(result.success.double().mean()) > 0.5
    assert not bool(result.zero_gradient.any())


def test_the_published_setting_is_the_authors() -> None:
    config = NeighborHinge.published()
    assert (config.n_guides, config.scale, config.guide_layer) == (None, "none", "first")  # None: m = 2k
    assert MARGIN == 1e-5
    attack = sw2_published()
    assert (attack.optimizer, attack.lr, attack.final_lr, attack.steps, attack.search_steps) == (
        "rmsprop",
        0.1,
        1.0,
        1000,
        10,
    )
    assert (attack.c0, attack.rise, attack.fall, attack.refresh_every, attack.narrow) == (1.0, 10.0, 10.0, 200, True)
    assert (attack.ceiling, attack.abort_early, attack.bisections, attack.peak) == (None, False, 0, 1.0)
    assert sw2_published(starts=5, n_guides=6) == sw2_published(6, starts=5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n_guides": 1}, "at least 2"),
    ({"scale": "mean"}, "scale must be one of"),
    ({"guide_layer": "last"}, "guide_layer must be one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeighborHinge(**options)
