"""Guarantees: what no attacker can do."""

from robustknn.certification.base import ABSTAINS, Certified, Certifier

__all__ = ["ABSTAINS", "Certified", "Certifier"]
