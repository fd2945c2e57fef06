"""Published methods by name; importing this registers the attacks."""

from robustknn.attacks.hardening import Hardening, adversarial_references
from robustknn.recipes.adaptive import adaptive, rank_pair
from robustknn.recipes.advknn import advknn, advknn_bim, advknn_fgsm
from robustknn.recipes.apgd import apgd_ce, apgd_dlr, apgd_margin
from robustknn.recipes.ask_def import PublishedASKDef, WorstCaseASKDef
from robustknn.recipes.attacks import (
    ask,
    ask_instance_wise,
    ask_published,
    bim_transfer,
    fgsm_transfer,
    pgd_transfer,
)
from robustknn.recipes.baselines import feature_target, mean, nearest_substitute
from robustknn.recipes.black_box import square_labels, square_published
from robustknn.recipes.carlini_wagner import cw_l2
from robustknn.recipes.daeknn import daeknn
from robustknn.recipes.minimum_norm import minimum_norm_thorough
from robustknn.recipes.published import Published
from robustknn.recipes.retrieval import web_scale_features
from robustknn.recipes.sitawarin_wagner import sw1, sw1_published, sw2, sw2_pgd, sw2_published
from robustknn.recipes.worst_case import WorstCase

__all__ = [
    "Hardening",
    "Published",
    "PublishedASKDef",
    "WorstCase",
    "WorstCaseASKDef",
    "adaptive",
    "adversarial_references",
    "advknn",
    "advknn_bim",
    "advknn_fgsm",
    "apgd_ce",
    "apgd_dlr",
    "apgd_margin",
    "ask",
    "ask_instance_wise",
    "ask_published",
    "bim_transfer",
    "cw_l2",
    "daeknn",
    "feature_target",
    "fgsm_transfer",
    "mean",
    "minimum_norm_thorough",
    "nearest_substitute",
    "pgd_transfer",
    "rank_pair",
    "square_labels",
    "square_published",
    "sw1",
    "sw1_published",
    "sw2",
    "sw2_pgd",
    "sw2_published",
    "web_scale_features",
]
