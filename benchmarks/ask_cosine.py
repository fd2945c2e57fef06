"""ASK by cosine: the cost of its steps and of its searches beside a bare cross-entropy loop."""

from __future__ import annotations

from benchmarks.ask import measure
from benchmarks.record import Result
from robustknn.objectives import ASK

FORMS = {
    "4 nearest classes": ASK(),
    "all 10 classes": ASK(max_classes=None),
}


def run(quick: bool) -> Result:
    """Measure with guides of two layers and of four."""
    return measure("cosine", FORMS, {2: 1.3, 4: 1.5}, quick)
