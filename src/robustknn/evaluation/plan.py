"""What a run's plan says of an attack on one classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED, WORST_CASE = "published", "worst-case"
"""The roles of attacks whose figures are columns: a classifier's own protocol, and what is read as robustness."""
EXACT, DEPLOYED, BOTH = "exact", "deployed", "exact, then deployed"
"""Where an attack on a classifier with an approximate index searches: see `approximation.Pair.seat`."""

FRESH = (
    "An attack fits the draw that its samples always get: the first figure is what a deployment with this seed keeps "
    "against who knows the seed, the second what its examples do where random numbers are drawn anew."
)
"""What the two accuracies of a randomized classifier mean."""


def attacks_on(plan: Mapping[str, Any], classifier: str) -> list[str]:
    """The attacks that are run on a classifier, in their order: all but those that cannot work on it."""
    run = {(c["classifier"], c["attack"]) for c in plan["cells"]}
    return [name for name in plan["attack_names"] if (classifier, name) in run]


def is_blind(plan: Mapping[str, Any], classifier: str, attack: str) -> bool:
    """Whether an attack looks at the network alone; the published one is another for every classifier."""
    described = plan["attacks"][attack]
    if described.get("name") == PUBLISHED:
        return bool(plan["classifiers"][classifier].get("published_transfer", described["transfer"]))
    return bool(described["transfer"])


def searches_of(plan: Mapping[str, Any], classifier: str) -> Mapping[str, str]:
    """Where each attack searches (EXACT, DEPLOYED or BOTH); empty for a classifier that searches exactly."""
    found: Mapping[str, str] = plan["classifiers"][classifier].get("searches", {})
    return found
