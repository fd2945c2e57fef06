"""A small data set in MNIST's real files: ten easy classes, so that a network learns them in one epoch."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of 8-bit numbers."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path, train: int = 300, test: int = 200, folder: str = "MNIST/raw") -> Path:
    """Write the four gzipped files below `root`: class c is a bright bar at its own place, in noise."""
    noise = np.random.default_rng(0)
    (root / folder).mkdir(parents=True)
    for stem, n in (("train", train), ("t10k", test)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = noise.integers(0, 120, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 2 : 2 * label + 6, 6:22] = 200
        for name, array in ((f"{stem}-images-idx3-ubyte.gz", images), (f"{stem}-labels-idx1-ubyte.gz", labels)):
            (root / folder / name).write_bytes(gzip.compress(idx(array)))
    return root
