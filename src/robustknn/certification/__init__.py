"""Guarantees: what no attacker can do."""

from robustknn.certification.base import ABSTAINS, Certified, Certifier
from robustknn.certification.poisoning import PoisoningInsert, PoisoningModify

__all__ = ["ABSTAINS", "Certified", "Certifier", "PoisoningInsert", "PoisoningModify"]
