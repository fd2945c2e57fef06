"""The published attacks by name, and their strong forms: compositions of an optimizer and an objective.

Every recipe takes further options of its optimizer (`steps`, `restarts`, `check_every`, …).
"""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import BIM, FGSM, PGD
from robustknn.checks import check_positive_int
from robustknn.objectives import ASK, CrossEntropy

register = registry.attacks.register


@register("ask")
def ask(
    kind: str = "class-wise",
    metric: str | None = None,
    n_neighbors: int | None = None,
    temperature: float = 0.05,
    layers: tuple[str, ...] | None = None,
    **options: Any,
) -> PGD:
    """PGD on the scale-free ASK margin: the default white-box attack on nearest neighbors."""
    objective = ASK(kind=kind, metric=metric, n_neighbors=n_neighbors, temperature=temperature, layers=layers)
    return PGD(objective=objective, **options)


@register("ask-instance-wise")
def ask_instance_wise(metric: str | None = None, n_neighbors: int | None = None, **options: Any) -> PGD:
    """PGD on the scale-free instance-wise ASK loss."""
    objective = ASK(kind="instance-wise", loss="cross-entropy", metric=metric, n_neighbors=n_neighbors)
    return PGD(objective=objective, **options)


@register("ask-published")
def ask_published(
    kind: str = "class-wise",
    metric: str = "l2",
    temperature: float = 0.1,
    n_neighbors: int = 5,
    steps: int = 10,
    step: float = 0.25,
    **options: Any,
) -> PGD:
    """ASK-Atk as released: raw distances, fixed temperature, constant steps of eps/4, last iterate."""
    objective = ASK.published(kind, metric=metric, temperature=temperature, n_neighbors=n_neighbors)
    return PGD(**{**_plain_pgd(objective, steps, step), **options})


@register("pgd-transfer")
def pgd_transfer(steps: int = 40, step: float | None = None, **options: Any) -> PGD:
    """PGD on the network's cross-entropy, blind to the neighbors: constant steps, random start, last iterate."""
    share = 2.5 / check_positive_int(steps, "steps") if step is None else step
    return PGD(**{**_plain_pgd(CrossEntropy(), steps, share), **options})


@register("bim-transfer")
def bim_transfer(**options: Any) -> BIM:
    """BIM on the network's cross-entropy, blind to the neighbors."""
    return BIM(objective=CrossEntropy(), **options)


@register("fgsm-transfer")
def fgsm_transfer(**options: Any) -> FGSM:
    """FGSM on the network's cross-entropy, blind to the neighbors."""
    return FGSM(objective=CrossEntropy(), **options)


def _plain_pgd(objective: ASK | CrossEntropy, steps: int, step: float) -> dict[str, Any]:
    """PGD as most papers run it: constant steps, random start, no momentum, neighbors once, last iterate."""
    return {
        "objective": objective,
        "steps": steps,
        "step": step,
        "schedule": "constant",
        "momentum": 0.0,
        "start": "random",
        "keep": "last",
        "refresh": False,
    }
