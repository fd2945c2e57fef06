"""Guarantees: what no attacker can do."""

from robustknn.certification.base import ABSTAINS, Certified, Certifier
from robustknn.certification.bisectors_certifier import FeatureBisector
from robustknn.certification.exact import FeatureExact
from robustknn.certification.input import InputCertificate
from robustknn.certification.lipschitz import Lipschitz
from robustknn.certification.poisoning import PoisoningInsert, PoisoningModify
from robustknn.certification.smoothed import Smoothed
from robustknn.certification.smoothed_embedding import EmbeddingSmoothing, SmoothedEmbedding, smoothed_references
from robustknn.certification.smoothing import Smoothing
from robustknn.certification.votes import FeatureVotes

__all__ = [
    "ABSTAINS",
    "Certified",
    "Certifier",
    "EmbeddingSmoothing",
    "FeatureBisector",
    "FeatureExact",
    "FeatureVotes",
    "InputCertificate",
    "Lipschitz",
    "PoisoningInsert",
    "PoisoningModify",
    "Smoothed",
    "SmoothedEmbedding",
    "Smoothing",
    "smoothed_references",
]
