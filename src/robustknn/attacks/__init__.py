"""Attacks: optimizers that climb an objective inside a threat model."""

from robustknn.attacks.base import Attack, AttackResult, Job
from robustknn.attacks.bim import BIM
from robustknn.attacks.fgsm import FGSM
from robustknn.attacks.gradient import GradientAttack
from robustknn.attacks.pgd import PGD

__all__ = ["BIM", "FGSM", "PGD", "Attack", "AttackResult", "GradientAttack", "Job"]
