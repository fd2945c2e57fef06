"""The randomness that torch draws itself (initial weights, dropout), seeded without touching global state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from robustknn import rng

M = TypeVar("M", bound=nn.Module)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's generators of the CPU and of a CUDA device hold `seed` inside; both get their states back."""
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def initialise(factory: Callable[[], M], seed: int) -> M:
    """A model with initial weights that depend on `seed` alone.

    Args:
        factory: makes the model on the CPU, e.g. `lambda: models.create("mnist-cnn")`.
    """
    with seeded(rng.derive(seed, "initialise")):
        return factory()
