"""Attacks: optimizers that climb an objective inside a threat model."""

from robustknn.attacks.apgd import APGD
from robustknn.attacks.base import Attack, AttackResult, Job
from robustknn.attacks.bim import BIM
from robustknn.attacks.credible import Credible
from robustknn.attacks.decision_based import Boundary, DecisionAttack, HopSkipJump
from robustknn.attacks.fgsm import FGSM
from robustknn.attacks.gradient import GradientAttack, ObjectiveAttack
from robustknn.attacks.mifgsm import MIFGSM
from robustknn.attacks.minimum_norm import MinimumNorm
from robustknn.attacks.pgd import PGD
from robustknn.attacks.square import Square
from robustknn.attacks.suite import Close, EachTarget, Members, Suite
from robustknn.attacks.tanh_box import TanhBox
from robustknn.attacks.transferred import Transferred

__all__ = [
    "APGD",
    "BIM",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Boundary",
    "Close",
    "Credible",
    "DecisionAttack",
    "EachTarget",
    "GradientAttack",
    "HopSkipJump",
    "Job",
    "Members",
    "MinimumNorm",
    "ObjectiveAttack",
    "Square",
    "Suite",
    "TanhBox",
    "Transferred",
]
