"""Published methods by name; importing this registers the attacks."""

from robustknn.recipes.apgd import apgd_ce, apgd_dlr, apgd_margin
from robustknn.recipes.attacks import (
    ask,
    ask_instance_wise,
    ask_published,
    bim_transfer,
    fgsm_transfer,
    pgd_transfer,
)
from robustknn.recipes.worst_case import WorstCase

__all__ = [
    "WorstCase",
    "apgd_ce",
    "apgd_dlr",
    "apgd_margin",
    "ask",
    "ask_instance_wise",
    "ask_published",
    "bim_transfer",
    "fgsm_transfer",
    "pgd_transfer",
]
