"""Random crops and horizontal flips, counted per sample and epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.errors import InputError

PADDING = 4


def crop_and_flip(x: Tensor, sample_ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Each image padded by 4 black pixels, cut out at a random place, and mirrored half of the time.

    Args:
        x: (N, C, H, W) images.
        sample_ids: (N,) int64; together with `seed` and `epoch` they decide what happens to a sample, in
            whatever batch it comes.

    Returns:
        (N, C, H, W).

    Raises:
        InputError: x does not hold images.
    """
    if x.ndim != 4:
        raise InputError(f"augment=True needs images (N, C, H, W); these samples have shape {tuple(x.shape[1:])}.")
    n, _, height, width = x.shape
    drawn = rng.uniform(sample_ids, (3,), seed, "augment", epoch).to(x.device)
    top, left = (drawn[:, :2] * (2 * PADDING + 1)).long().unbind(1)
    padded = nn.functional.pad(x, (PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, 9, 9, H, W)
    cut = windows[torch.arange(n, device=x.device), :, top, left]
    return torch.where((drawn[:, 2] < 0.5)[:, None, None, None], cut.flip(3), cut)
