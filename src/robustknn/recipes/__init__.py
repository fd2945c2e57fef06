"""Published methods by name; importing this registers the attacks."""

from robustknn.recipes.attacks import (
    ask,
    ask_instance_wise,
    ask_published,
    bim_transfer,
    fgsm_transfer,
    is_transfer,
    pgd_transfer,
)

__all__ = [
    "ask",
    "ask_instance_wise",
    "ask_published",
    "bim_transfer",
    "fgsm_transfer",
    "is_transfer",
    "pgd_transfer",
]
