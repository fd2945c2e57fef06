"""Guarantees: what no attacker can do."""

from robustknn.certification.base import ABSTAINS, Certified, Certifier
from robustknn.certification.smoothed import Smoothed
from robustknn.certification.smoothed_embedding import EmbeddingSmoothing, SmoothedEmbedding, smoothed_references
from robustknn.certification.smoothing import Smoothing

__all__ = [
    "ABSTAINS",
    "Certified",
    "Certifier",
    "EmbeddingSmoothing",
    "Smoothed",
    "SmoothedEmbedding",
    "Smoothing",
    "smoothed_references",
]
