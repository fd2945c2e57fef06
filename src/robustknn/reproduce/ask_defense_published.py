"""ASK-Def as its authors compared it: the cross-entropy of either training at half the radius of the attack.

Only ASK-Def sees examples as large as those it is attacked with (8/255 on CIFAR-10; the cross-entropy has 4/255), so
the gain is that of its loss and of the radius together; `ask-defense` takes them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from robustknn.reproduce.ask_defense_victim import ADVERSARIAL, DEFENSE, HALF, Compared
from robustknn.reproduce.experiment import experiments


@experiments.register("ask-defense-published")
class ASKDefensePublished(Compared):
    """What ASK-Def brings as it was published."""

    table = "ASK-Def as published"
    title = "A kNN on features of adversarial training and ASK-Def, the cross-entropy of both at half the radius"
    networks = (ADVERSARIAL + HALF, DEFENSE + HALF)
    gains: ClassVar[Mapping[str, tuple[str, str]]] = {"gain of ASK-Def": (DEFENSE + HALF, ADVERSARIAL + HALF)}
