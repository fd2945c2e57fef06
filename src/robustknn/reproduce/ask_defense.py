"""ASK-Def beside adversarial training at equal epochs and at equal gradient passes, all at the radius of the attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from robustknn.reproduce.ask_defense_victim import ADVERSARIAL, ATTACK, CLEAN, DEFENSE, LONGER, PLAIN, Compared
from robustknn.reproduce.experiment import WORST, Front, experiments


@experiments.register("ask-defense")
class ASKDefense(Compared):
    """What the loss of ASK-Def brings, apart from its radius and its passes."""

    table = "ASK-Def"
    title = "A kNN on features of standard training, adversarial training and ASK-Def at equal budgets"
    front: ClassVar[Front] = {
        f"kNN after {said}": ((name, CLEAN), (name, ATTACK), (name, WORST))
        for name, said in (
            (ADVERSARIAL, "adversarial training"),
            (DEFENSE, "ASK-Def training"),
            (LONGER, "adversarial training, as many passes as ASK-Def"),
        )
    }
    networks = (PLAIN, ADVERSARIAL, DEFENSE, LONGER)
    gains: ClassVar[Mapping[str, tuple[str, str]]] = {
        "gain of ASK-Def": (DEFENSE, ADVERSARIAL),
        "gain of ASK-Def at equal gradient passes": (DEFENSE, LONGER),
    }
