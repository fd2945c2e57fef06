"""How a network that ASK-Def trained is measured: by the attack of its paper, and by that loss at every other setting.

Wang et al., "ASK: Adversarial Soft k-Nearest Neighbor Attack and Defense", arXiv 2106.14300.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from robustknn import registry
from robustknn.attacks import PGD, Attack, Job, Suite
from robustknn.checks import check_choice, check_layers
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.objectives import ASK
from robustknn.recipes.attacks import ask_published
from robustknn.recipes.worst_case import STRENGTHS, WorstCase


@registry.attacks.register("published-ask-def")
@dataclass(frozen=True)
class PublishedASKDef(Attack):
    """ASK-Atk as its authors measure ASK-Def by it: cosines, T = .01, 5 references a class, 20 steps of eps/4.

    It takes the place of the protocol that a report shows for the classifier over the network.
    """

    role: ClassVar[str] = "published"

    def check(self, classifier: Classifier, x: Tensor) -> None:
        _ask_atk().check(classifier, x)

    def run(self, job: Job) -> None:
        _ask_atk().run(job)


@cache
def _ask_atk() -> Attack:
    return ask_published(metric="cosine", temperature=0.01, steps=20, step=0.25)


@registry.attacks.register("worst-case-ask-def")
@dataclass(frozen=True)
class WorstCaseASKDef(Suite):
    """The worst case and, of what still stands, ASK at other layers, metrics, temperatures and numbers of references.

    Args:
        layers: layers of the references to look at besides those that vote: each by itself, then all together.
        strength: of the worst case: "fast", "standard" or "thorough".
    """

    role: ClassVar[str] = "worst-case"

    layers: tuple[str, ...] | None = None
    strength: str = "standard"

    def __post_init__(self) -> None:
        check_choice(self.strength, STRENGTHS, "strength")
        object.__setattr__(self, "layers", check_layers(self.layers))

    def check(self, classifier: Classifier, x: Tensor) -> None:
        if isinstance(classifier, VoterClassifier):
            for held in dict.fromkeys(voter.references for voter in classifier.voters):
                for layer in self.layers or ():
                    held.layer(layer)  # refuses one that they do not hold
        super().check(classifier, x)

    def members(self) -> dict[str, Attack]:
        return dict(_members(self.layers or (), self.strength))


@registry.attacks.register("worst-case-ask-def-fast")
def worst_case_ask_def_fast(layers: tuple[str, ...] | None = None) -> WorstCaseASKDef:
    """The worst case that knows ASK-Def over the few attacks that find most, in minutes."""
    return WorstCaseASKDef(layers, "fast")


@registry.attacks.register("worst-case-ask-def-thorough")
def worst_case_ask_def_thorough(layers: tuple[str, ...] | None = None) -> WorstCaseASKDef:
    """The worst case that knows ASK-Def with restarts, every target and long black-box runs."""
    return WorstCaseASKDef(layers, "thorough")


@cache
def _members(layers: tuple[str, ...], strength: str) -> dict[str, Attack]:
    variants = {f"ask at {layer}": ASK(layers=(layer,), allow_approximate=True) for layer in layers}
    if len(layers) > 1:
        variants["ask at all layers"] = ASK(layers=layers, allow_approximate=True)
    for metric in ("l2", "cosine"):
        variants[f"ask by {metric}"] = ASK(metric=metric, allow_approximate=True)
    for temperature in (0.01, 0.2):
        variants[f"ask, temperature {temperature}"] = ASK(temperature=temperature, allow_approximate=True)
    for count in (1, 50):
        variants[f"ask, {count} of a class"] = ASK(n_neighbors=count, allow_approximate=True)
    return {"worst-case": WorstCase(strength), **{name: PGD(objective=each) for name, each in variants.items()}}
