"""Guarantees: what no attacker can do."""

from robustknn.certification.base import ABSTAINS, Certified, Certifier
from robustknn.certification.bisectors_certifier import FeatureBisector
from robustknn.certification.exact import FeatureExact
from robustknn.certification.input import InputCertificate
from robustknn.certification.lipschitz import Lipschitz
from robustknn.certification.votes import FeatureVotes

__all__ = [
    "ABSTAINS",
    "Certified",
    "Certifier",
    "FeatureBisector",
    "FeatureExact",
    "FeatureVotes",
    "InputCertificate",
    "Lipschitz",
]
