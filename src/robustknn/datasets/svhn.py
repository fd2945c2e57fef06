"""SVHN, cropped digits (Netzer et al., 2011): 32 × 32 colour images of house numbers, 10 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustknn.datasets.base import Split
from robustknn.datasets.files import Form, find_files
from robustknn.datasets.protocols import Official
from robustknn.errors import IntegrityError
from robustknn.progress import Progress
from robustknn.registry import datasets

_FORM = Form(("svhn", "SVHN", ""), ("train_32x32.mat", "test_32x32.mat"))
MAX_IMAGES = 600_000
"""The largest part of the set (`extra`) has 531,131 images; a file that announces more is refused."""


@datasets.register("svhn")
def svhn(root: Path | None = None, download: bool = False, progress: Progress | None = None) -> Official:
    """House numbers, 73,257 / 26,032 colour images of 32 × 32."""
    _, (train, test) = find_files("svhn", root, [_FORM], download, progress)
    return Official("svhn", _split(train, "train"), _split(test, "test"), tuple("0123456789"))


def _split(path: Path, part: str) -> Split:
    """X (32, 32, 3, n), axes height, width, channel, sample; y (n, 1) with 1..10, where 10 is the digit 0."""
    images, labels = _read(path)
    if labels.min() < 1 or labels.max() > 10:
        raise IntegrityError(f"{str(path)!r} holds labels outside 1..10; get it again.")
    # MATLAB stores the last axis slowest, so that this view keeps each sample in one place: no copy is made.
    return Split(torch.from_numpy(images.transpose(3, 2, 0, 1)), torch.from_numpy(labels.astype(np.int64) % 10), part)


def _read(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from scipy.io import loadmat, whosmat

    try:
        # The shapes are looked at before anything is allocated.
        announced = {name: shape for name, shape, _ in whosmat(str(path))}
        n = announced["X"][3]
        whole = announced["X"] == (32, 32, 3, n) and announced["y"] == (n, 1) and 0 < n <= MAX_IMAGES
        content = loadmat(str(path), variable_names=["X", "y"]) if whole else {}
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise IntegrityError(f"{str(path)!r} is not a whole MATLAB 5 file of SVHN ({error}); get it again.") from error
    if not whole or content["X"].dtype != np.uint8 or content["y"].dtype.kind not in "uif":
        raise IntegrityError(
            f"{str(path)!r} holds {announced} where 8-bit X (32, 32, 3, n) and y (n, 1) belong; get it again."
        )
    return content["X"], content["y"][:, 0]
