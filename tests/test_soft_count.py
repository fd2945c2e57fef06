"""Sitawarin & Wagner's soft count against its formula written out in NumPy, one guide at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sides_by_hand import distance, nearest_of, other_class, sphere
from small import random_classifier, random_net
from torch import Tensor

from robustknn import PGD, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.objectives import SoftCount
from robustknn.recipes import sw1_published

Array = NDArray[np.float64]


def by_hand(config: SoftCount, classifier: DkNN, x0: Tensor, x: Tensor, y: int, target: int | None = None) -> float:
    """The loss of one input whose guides were looked up at x0: loops over layers and guides."""
    references, metric = classifier.references_, config.metric or classifier.metric
    layers, labels = references.layers, references.labels.numpy()
    ids = torch.arange(len(labels))
    with torch.no_grad():
        start = {k: v[0].numpy() for k, v in references.extractor()(x0[None]).items()}
        here = {k: v[0].numpy() for k, v in references.extractor()(x[None]).items()}
    own, k = y if target is None else target, classifier.n_neighbors
    m = config.n_guides or k
    asked = layers[:1] if config.guide_layer == "first" else layers
    other = other_class([(start[v], references.rows(v, ids).numpy()) for v in asked], labels, own, m, metric)
    total, side = 0.0, 1.0 if target is None else -1.0
    for place, layer in enumerate(layers):
        vectors = references.rows(layer, ids).numpy()
        chosen_in = layers[0] if config.guide_layer == "first" else layer
        chosen_from = references.rows(chosen_in, ids).numpy()
        every = np.sort([sphere(start[layer], r, metric) for r in vectors])
        eta = float(every[k - 1])
        if isinstance(config.threshold, tuple):
            eta = config.threshold[place]
        elif config.threshold == "average":
            apart = [np.sort([sphere(a, b, metric) for b in vectors]) for a in vectors]
            eta = float(np.mean([a[k] for a in apart]))  # a[0] is the reference itself
        unit = eta if config.scale == "radius" else 1.0
        for c, w in ((own, side), (other, -side)):
            if w > 0 and not config.repel:
                continue
            for j in nearest_of(start[chosen_in], chosen_from, labels, c, m, metric):
                d = sphere(here[layer], vectors[j], metric)
                total -= w / (1 + np.exp(-config.steepness * (eta - d) / unit))
    return float(total)


def losses(
    config: SoftCount, classifier: DkNN, x0: Tensor, x: Tensor, y: Tensor, target: Tensor | None = None
) -> Tensor:
    bound = config.bind(classifier)
    return bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)


FORMS = [
    SoftCount(),
    SoftCount(steepness=9.0, n_guides=3),
    SoftCount(scale="none"),
    SoftCount(threshold="average"),
    SoftCount(threshold=(0.3, 0.7), scale="none", repel=False),
    SoftCount(metric="cosine", guide_layer="first"),
    SoftCount.published(4),
    SoftCount.published(4, threshold=(0.2, 0.1)),
]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_every_form_equals_the_formula(config: SoftCount, metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    x = x0 + 0.05
    for target in (None, (y + 1) % 4):
        got = losses(config, classifier, x0, x, y, target)
        want = [
            by_hand(config, classifier, x0[i], x[i], int(y[i]), None if target is None else int(target[i]))
            for i in range(len(x))
        ]
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("config", FORMS[:5], ids=str)
def test_gradients_by_finite_differences(config: SoftCount) -> None:
    classifier, x0, y = random_classifier()
    bound = config.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, ((x0 + 0.05).requires_grad_(True),))


def test_inner_products_count_by_how_far_they_reach() -> None:
    """σ of the difference of inner products: what the distances are measured from cancels without scale."""
    classifier, x0, y = random_classifier(metric="ip", layers=("1",))
    config, x = SoftCount(scale="none", n_guides=3), x0 + 0.05
    rows = classifier.references_.rows("1", torch.arange(80)).numpy()
    labels = classifier.references_.labels.numpy()
    with torch.no_grad():
        start, here = (classifier.references_.extractor()(v)["1"].numpy() for v in (x0, x))
    want = []
    for i in range(len(x)):
        own, eta = int(y[i]), np.sort([distance(start[i], r, "ip") for r in rows])[4]
        other = other_class([(start[i], rows)], labels, own, 3, "ip")
        total = 0.0
        for c, w in ((own, 1.0), (other, -1.0)):
            for j in nearest_of(start[i], rows, labels, c, 3, "ip"):
                total -= w / (1 + np.exp(-4 * (eta - distance(here[i], rows[j], "ip"))))
        want.append(total)
    assert losses(config, classifier, x0, x, y).tolist() == pytest.approx(want, rel=1e-6)


def test_the_published_setting_is_the_released_one() -> None:
    config = SoftCount.published()
    assert (config.steepness, config.metric, config.scale, config.n_guides) == (4.0, "cosine", "none", 75)
    assert (config.guide_layer, config.repel, config.threshold) == ("first", False, "average")
    attack = sw1_published()
    assert (attack.optimizer, attack.lr, attack.final_lr, attack.steps, attack.search_steps) == (
        "adam",
        0.1,
        1.0,
        1000,
        5,
    )
    assert (attack.c0, attack.rise, attack.fall, attack.refresh_every) == (10.0, 10.0, 2.0, 0)
    assert (attack.abort_early, attack.penalty, attack.hard_box, attack.bisections) == (True, True, False, 0)
    box = sw1_published(fixed_radius=True)
    assert (box.hard_box, box.penalty, box.search_steps) == (True, False, 1)


def test_a_class_with_few_references_and_guides_looked_up_anew() -> None:
    """Missing guides count nothing, and after an update the loss is that of the new point."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.zeros(20), torch.ones(20), torch.full((2,), 2)]).long()
    x = torch.rand(42, 6, generator=generator, dtype=torch.float64)
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(random_net(), ["1"]), (x, y)), 2)
    config, queries, labels = SoftCount(n_guides=5), x[:9] + 0.01, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    bound = config.bind(classifier)
    batch = bound.start(queries, labels, None, classifier.look(queries, bound.requests))
    kept, moved = torch.tensor([8, 2, 2]), queries[[8, 2, 2]] + 0.1
    batch.update(kept, None)
    old = [by_hand(config, classifier, queries[i], queries[i], int(labels[i])) for i in (8, 2, 2)]
    assert batch.loss(queries[kept]).tolist() == pytest.approx(old, rel=1e-6)
    batch.update(None, classifier.look(moved, bound.requests))
    new = [by_hand(config, classifier, m, m, int(labels[i])) for m, i in zip(moved, (8, 2, 2), strict=True)]
    assert batch.loss(moved).tolist() == pytest.approx(new, rel=1e-6)


def test_a_reference_at_the_input_gives_a_finite_gradient() -> None:
    classifier, _, _ = random_classifier(layers=("1",))
    x = torch.rand(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:8]
    for config in (SoftCount(), SoftCount.published(3)):
        result = PGD(config, steps=2)(classifier, x, torch.arange(8) % 4, ThreatModel("l2", 0.1))
        assert not bool(result.zero_gradient.any())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_an_input_that_is_a_reference_can_be_led_away_from_it(metric: str) -> None:
    """The k-th neighbor of a training image is itself for k = 1: a divisor of 0 left every count whole, or none."""
    classifier, _, _ = random_classifier(k=1, layers=("1",), metric=metric)
    x = torch.rand(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:8]
    y, threat = torch.arange(8) % 4, ThreatModel("linf", 0.5)
    assert torch.equal(classifier.labels(x), y)
    # The distance itself has no gradient at zero: a random start has left it.
    result = PGD(SoftCount(), steps=20, start="random", refresh=False)(classifier, x, y, threat)
    assert float(result.success.double().mean()) > 0.7


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steepness": 0.0}, "steepness must be a number above 0"),
    ({"threshold": "typical"}, "threshold must be one of"),
    ({"threshold": (0.1, -1.0)}, "threshold must be a number above 0"),
    ({"scale": "mean"}, "scale must be one of"),
    ({"n_guides": 0}, "at least 1"),
    ({"metric": "l1"}, "metric must be one of"),
    ({"guide_layer": "last"}, "guide_layer must be one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftCount(**options)


def test_what_it_cannot_attack_is_refused_in_a_sentence() -> None:
    classifier, _, _ = random_classifier()
    with pytest.raises(InputError, match="3 values for 2 layers"):
        SoftCount(threshold=(0.1, 0.2, 0.3)).bind(classifier)
    by_product, _, _ = random_classifier(metric="ip")
    with pytest.raises(InputError, match="no average radius"):
        SoftCount(threshold="average").bind(by_product)
