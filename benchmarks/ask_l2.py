"""ASK by L2 with five references a class: the cost of its steps and searches beside a bare cross-entropy loop."""

from __future__ import annotations

from benchmarks.ask import measure
from benchmarks.record import Result
from robustknn.objectives import ASK

FORMS = {
    "K = 5, quadratic mean, 4 nearest classes": ASK(n_neighbors=5),
    "K = 5, quadratic mean, all 10 classes": ASK(n_neighbors=5, max_classes=None),
    "K = 5, arithmetic mean, 4 nearest classes": ASK.published(max_classes=4),
    "K = 5, arithmetic mean, all 10 classes (as published)": ASK.published(),
}


def run(quick: bool) -> Result:
    """Measure with guides of two layers and of four."""
    return measure("l2", FORMS, {2: 1.6, 4: 2.7}, quick)
