"""Faces of a classifier for other libraries: torch modules, foolbox, ART."""

from robustknn.adapters.libraries import to_art, to_foolbox
from robustknn.adapters.modules import HardScores, as_hard
from robustknn.adapters.soft import Surrogate, surrogate

__all__ = ["HardScores", "Surrogate", "as_hard", "surrogate", "to_art", "to_foolbox"]
