"""Black-box attacks by name, in their published settings and by labels alone."""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import Square

register = registry.attacks.register


@register("square-published")
def square_published(**options: Any) -> Square:
    """Square as AutoAttack runs it, with 5,000 queries, accepting only what is better."""
    return Square(**{"queries": 5000, "accept": "better", **options})


@register("square-labels")
def square_labels(**options: Any) -> Square:
    """Square on the decision alone, whatever scores the classifier tells."""
    return Square(**{"feedback": "labels", **options})
