"""foolbox and the Adversarial Robustness Toolbox (ART): their guarded imports, and their global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from robustknn.errors import needs


def load_foolbox() -> Any:
    """The foolbox module; MissingExtraError where it cannot be imported."""
    with needs("foolbox", "foolbox"):
        import foolbox
    return foolbox


def load_art() -> Any:
    """The art module with its estimators and evasion attacks; MissingExtraError where it cannot be imported."""
    with needs("adversarial-robustness-toolbox", "art"):
        import art.attacks.evasion
        import art.estimators.classification
    return art


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random numbers of Python, NumPy and torch as this seed makes them, and afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
